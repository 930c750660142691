"""Every file, symbol and command that README.md, CONTRIBUTING.md and docs/ name exists."""

import ast
import functools
import importlib.util
import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.fast

ROOT = Path(__file__).parent.parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = ("mtpjax", "kernels_pallas", "checkpoints", "tests", "scripts", "docs", ".ci")
# Names of other projects, of file formats and of commands that stand in backticks, too.
FOREIGN_NAMES = """
    jax jnp lax nnx flax gguf numpy torch xz pip hf make XLA JAX wgmma join scan div rem huggingface_hub
    elementwise_inline_asm ruff mypy pytest slow fast qwen35 qwen35moe g_idx imatrix softmax gumbel beta
    argmax ldmatrix dot_general searchsorted lint-imports Precision mtp id prompt messages text token_ids
    metrics finish_reason max_tokens
"""
FOREIGN = re.compile(rf"^({'|'.join(FOREIGN_NAMES.split())})\b")


@functools.cache
def symbols() -> set[str]:
    """Collect the names of all Python files and folders, and every name that a file defines or takes as an argument."""
    names: set[str] = set()
    for folder in ("mtpjax", "kernels_pallas", "checkpoints", "tests", "scripts"):
        for file in (ROOT / folder).rglob("*.py"):
            names |= {file.stem, file.parent.name}
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
                    names.add(node.name)
                elif isinstance(node, ast.arg):
                    names.add(node.arg)
                elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                    names.add(node.id)
                elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                    names.add(node.attr)
                elif isinstance(node, ast.keyword) and node.arg:
                    names.add(node.arg)
    return names


def missing_names(text: str) -> list[str]:
    """Return what the inline code of a page names and the repository does not have."""
    text = re.sub(r"```.*?```", "", text, flags=re.S)
    missing = []
    for code in re.findall(r"`([^`\n]+)`", text):
        path = re.fullmatch(r"([\w.\-*]+(?:/[\w.\-*]+)+/?|\w+\.(?:md|toml))", code)
        if path and code.split("/")[0] in (*FOLDERS, "README.md", "CONTRIBUTING.md", "pyproject.toml"):
            if not list(ROOT.glob(code.rstrip("/"))):
                missing.append(code)
        elif (module := re.search(r"python -m ((?:scripts|tests|mtpjax)[\w.]*)", code)) is not None:
            if importlib.util.find_spec(module[1]) is None:
                missing.append(code)
        elif re.fullmatch(r"\w+\.py", code):
            if not list(ROOT.glob(f"*/**/{code}")):
                missing.append(code)
        elif re.fullmatch(r"[A-Za-z_]\w*(\.\w+)*(\(\))?", code) and not FOREIGN.match(code) and not code.isupper():
            parts = code.rstrip("()").split(".")
            known = {"mtpjax", "kernels_pallas", "checkpoints", "scripts", "tests"}
            if parts[0] in known:
                found = importlib.util.find_spec(code) is not None or parts[-1] in symbols()
            else:
                found = all(part in symbols() for part in parts)
            if not found:
                missing.append(code)
    return missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_everything_a_page_names_exists(page: Path) -> None:
    assert missing_names(page.read_text(encoding="utf-8")) == []


def test_a_wrong_name_is_seen() -> None:
    page = (
        "`mtpjax/llm.py`, `mtpjax/nothing.py`, `LLM.generate`, `LLM.nothing_of_this_name`, `python -m scripts.nothing`"
    )
    assert missing_names(page) == ["mtpjax/nothing.py", "LLM.nothing_of_this_name", "python -m scripts.nothing"]


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[\w-]*)?\)", page.read_text(encoding="utf-8")):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_readme_is_one_page() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


def test_the_python_of_the_readme_runs() -> None:
    """The example of the README, with the embedded model."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.S)
    scope: dict = {}
    exec(compile(code, "README.md", "exec"), scope)
    assert scope["answer"].text
