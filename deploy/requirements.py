"""Print what pyproject.toml asks for, one requirement a line: `requirements.py EXTRA ...`; pip has no option for it."""

import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
lists = [project["dependencies"], *(project["optional-dependencies"][extra] for extra in sys.argv[1:])]
print("\n".join(dict.fromkeys(requirement for each in lists for requirement in each)))
