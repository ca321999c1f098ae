"""Promises about the package itself: start-up, imports, metadata, what is in the tree."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "assay"

# Each room may import from the rooms named here, from itself, and from the modules of errors and of compiling; from
# nothing else of Assay.
ALLOWED = {
    "kernels": set(),
    "models": set(),
    "watermark": {"kernels"},
    "detection": {"kernels", "watermark", "models"},
    "conformal": {"kernels", "watermark", "detection", "models"},
    "privacy": set(),
    "report": {"kernels", "watermark", "detection", "conformal", "privacy", "models"},
    "service": {"kernels", "watermark", "detection", "conformal", "privacy", "models", "report"},
}
TORCH_ALLOWED = (
    "kernels/scoring/",
    "kernels/torch_race.py",
    "kernels/triton_chacha.py",
    "kernels/triton_sampling.py",
    "watermark/adapters/",
    "models/",
    "service/generation.py",
)


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    return done.stdout


def imports(path: Path) -> set[str]:
    """All modules a file imports, at any depth, except under `if TYPE_CHECKING`."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return found


def test_import_is_light() -> None:
    loaded = set(run("import sys, assay; print(*sys.modules)").split())
    assert loaded.isdisjoint({"torch", "transformers", "numpy", "numba", "matplotlib", "pyarrow", "typer"})


def test_testing_ids_needs_neither_torch_nor_tokenizers() -> None:
    code = "import sys, assay; key = assay.SecretKey.generate(); assay.detect(range(300), key);print(*sys.modules)"
    loaded = set(run(code).split())
    assert loaded.isdisjoint({"torch", "transformers", "tokenizers", "matplotlib", "pyarrow"})


def test_help_loads_no_numerics() -> None:
    code = "import sys; from assay.cli import app; print(*sys.modules)"
    assert set(run(code).split()).isdisjoint({"torch", "numpy", "scipy", "numba", "matplotlib", "pyarrow"})


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_one_way(path: Path) -> None:
    relative = path.relative_to(PACKAGE)
    names = imports(path)
    room = relative.parts[0]
    if room in ALLOWED:
        used = {name.split(".")[1] for name in names if name.startswith("assay.")} - {room, "_errors", "_compiled"}
        # `from assay import __version__` is the one name taken from the top.
        assert used - {"__version__"} <= ALLOWED[room], f"{relative} imports {sorted(used - ALLOWED[room])}"
    if not relative.as_posix().startswith(TORCH_ALLOWED) and room != "demo.py":
        tops = {name.split(".")[0] for name in names}
        assert tops.isdisjoint({"torch", "transformers", "triton"}), relative


def test_metadata_keeps_ranges() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    requirements = [*project["dependencies"], *(line for lines in extras.values() for line in lines)]
    assert "torch>=2.6" in extras["models"]
    assert not [line for line in requirements if re.search(r"==|<|~=", line.split(";")[0])]


def test_tests_install_torch_by_version_first() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(r"^torch==\d", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert makefile.index('"torch==') < makefile.index("-e '.[")


def test_public_names_exist() -> None:
    import assay

    for name in assay.__all__:
        value = getattr(assay, name)
        assert name == "__version__" or value.__module__.startswith("assay."), name
    assert set(assay.__all__) <= set(dir(assay))


def test_version_is_stated_once() -> None:
    import assay

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["version"] == assay.__version__


def test_ctrl_c_while_the_command_loads_shows_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    from assay import __main__ as command

    class Loading(ModuleType):
        def __getattr__(self, name: str) -> object:
            raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "assay.cli", Loading("assay.cli"))
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 130
    metadata = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert metadata["project"]["scripts"]["assay"] == "assay.__main__:main"


@pytest.mark.parametrize(
    "arguments",
    [["demo", "--out", "tour"], ["plan", "prompts.txt"], ["calibrate", "prompts.txt", "--out", "calibration.json"]],
    ids=lambda arguments: arguments[0],
)
def test_commands_that_need_a_model_say_what_to_install(arguments: list[str], tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("It was late in the evening when\n", encoding="utf-8")
    code = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers", "safetensors"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
from assay.cli import main
main()
"""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1, done.stderr
    assert "pip install 'assay[models]'" in done.stderr
    assert "Traceback" not in done.stderr
