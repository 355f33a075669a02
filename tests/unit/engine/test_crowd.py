"""How many processes of engines one host gets."""

import pytest

from tokenspeed.core.config import EngineConfig
from tokenspeed.core.errors import ConfigError
from tokenspeed.engine.build import build_engine
from tokenspeed.engine.crowd import check_crowd


def test_more_processes_than_a_host_has_a_use_for_are_refused_with_their_flags() -> None:
    check_crowd(EngineConfig(model="m", dp=4, tp=2, cp=2), ranks=4)
    config = EngineConfig(model="m", dp=5, tp=1000, cp=100)
    with pytest.raises(ConfigError, match="--tp 1000 --cp 100 --dp 5 makes 500000 processes"):
        check_crowd(config, ranks=100_000)


def test_ranks_of_one_engine_may_go_to_other_hosts_and_engines_may_not() -> None:
    with pytest.raises(ConfigError, match="spread the ranks over hosts"):
        check_crowd(EngineConfig(model="m", tp=100_000), ranks=100_000)
    with pytest.raises(ConfigError, match=r"at most: lower them$"):
        check_crowd(EngineConfig(model="m", dp=100_000), ranks=1)


@pytest.mark.parametrize("flag", ["tp", "cp"])
def test_an_engine_starts_none_of_too_many_ranks(flag: str) -> None:
    # Not even the model is looked for.
    config = EngineConfig(model="no-such-model", **{flag: 10_000})
    with pytest.raises(ConfigError, match=f"--{flag} 10000"):
        build_engine(config)
