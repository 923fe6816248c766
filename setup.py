"""Builds the package `multimodal_diff` from the flat files, so that no module named `data` or `models` is installed.

The files are copied into one folder, in which `from data import ...` becomes `from multimodal_diff.data import ...`;
`multimodal_diff.py` becomes its __init__.py. Names, versions and commands are in pyproject.toml. An editable install
(`pip install -e`) is refused: there is no such folder in a checkout.
"""

import ast
import re
import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

PACKAGE = "multimodal_diff"
ROOT = Path(__file__).resolve().parent
CHECKOUT_ONLY = ("setup.py", "study*.py")  # the study reads its plan from git
SOURCES = [file for file in sorted(ROOT.glob("*.py")) if not any(map(file.match, CHECKOUT_ONLY))]
SOURCES += sorted(ROOT.glob("needle_eval/*.py"))
ASSETS = [file for file in sorted(ROOT.glob("assets/*/**/*")) if file.is_file() and file.suffix not in (".py", ".pyc")]
LOCAL = sorted({file.relative_to(ROOT).parts[0].removesuffix(".py") for file in SOURCES} - {PACKAGE})


def rewrite_imports(text: str) -> str:
    """The source of a module, with imports of the flat files turned into imports of the package."""
    names = "|".join(LOCAL)
    text = re.sub(rf"^(\s*)from ({names})((?:\.\w+)*) import ", rf"\1from {PACKAGE}.\2\3 import ", text, flags=re.M)
    return re.sub(rf"^(\s*)import ({names})$", rf"\1from {PACKAGE} import \2", text, flags=re.M)


def check_imports(text: str, name: str) -> None:
    """Raise SystemExit if a module still imports a flat file, in a form that `rewrite_imports` does not handle."""
    for node in ast.walk(ast.parse(text)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        if any(module.partition(".")[0] in LOCAL for module in names):
            raise SystemExit(f"{name}, line {node.lineno}: write `import name` or `from name import ...`")


class BuildPackage(build_py):
    """Writes the package into the build folder."""

    def target(self, file: Path) -> Path:
        name = "__init__.py" if file.name == f"{PACKAGE}.py" else file.relative_to(ROOT)
        return Path(self.build_lib, PACKAGE, name)

    def run(self) -> None:
        if self.editable_mode:
            raise SystemExit("an editable install is not supported: run the scripts in the checkout")
        shutil.rmtree(Path(self.build_lib, PACKAGE), ignore_errors=True)  # files of an earlier build
        for file in (*SOURCES, *ASSETS):
            target = self.target(file)
            target.parent.mkdir(parents=True, exist_ok=True)
            if file.suffix == ".py":
                text = rewrite_imports(file.read_text(encoding="utf-8"))
                check_imports(text, file.name)
                target.write_text(text, encoding="utf-8")
            else:
                shutil.copyfile(file, target)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        return [str(self.target(file)) for file in (*SOURCES, *ASSETS)]

    def get_source_files(self) -> list[str]:
        return [str(file.relative_to(ROOT)) for file in (*SOURCES, *ASSETS)]


setup(packages=[PACKAGE], package_dir={PACKAGE: "."}, cmdclass={"build_py": BuildPackage})
