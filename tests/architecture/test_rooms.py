"""The structure of the code is as docs/architecture.md says."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "tokenspeed"
PACKAGES = sorted(path.parent for path in SOURCE.glob("*/__init__.py"))
MODULES = sorted(SOURCE.rglob("*.py"))
WITHOUT_TORCH = (
    "tokenspeed",
    "tokenspeed.cli.main",
    "tokenspeed.control",
    # What an engine's process does before it imports torch.
    "tokenspeed.engine.__main__",
    "tokenspeed.engine.client",
    "tokenspeed.engine.process",
    "tokenspeed.entrypoint.servicer",
    "tokenspeed.entrypoint.gateway",
    "tokenspeed.loader",
)


def test_imports_point_one_way() -> None:
    lint = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([lint], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: path.name)
def test_each_package_says_what_it_owns_and_never_does(package: Path) -> None:
    docstring = ast.get_docstring(ast.parse((package / "__init__.py").read_text())) or ""
    first = docstring.splitlines()[0]
    assert "never" in first, first


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_no_file_is_longer_than_400_lines(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400


@pytest.mark.parametrize(
    "path", sorted((SOURCE / "modeling" / "models").glob("*.py")), ids=lambda path: path.name
)
def test_a_model_is_under_200_lines_and_names_no_collective(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) < 200
    for word in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "distributed"):
        assert word not in text


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_what_faces_clients_or_comes_first_imports_no_torch(module: str) -> None:
    program = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_no_code_path_runs_what_a_file_says(path: Path) -> None:
    forbidden = {"pickle", "marshal", "shelve", "dill"}
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Import(names=names):
                assert not forbidden & {name.name.split(".")[0] for name in names}
            case ast.ImportFrom(module=str(module)):
                assert module.split(".")[0] not in forbidden
            case ast.Call(func=ast.Name(id="eval" | "exec")):
                raise AssertionError(f"line {node.lineno} calls {ast.unparse(node)}")
            case ast.keyword(arg="trust_remote_code" | "shell"):
                raise AssertionError(f"{ast.unparse(node)} is passed")


def test_only_one_module_reads_the_environment() -> None:
    readers = {
        str(path.relative_to(SOURCE))
        for path in MODULES
        if "os.environ" in path.read_text() or "os.getenv" in path.read_text()
    }
    assert readers <= {"core/environment.py"}
