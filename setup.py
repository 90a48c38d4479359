"""Package metadata for `llmpapers`, read from settings.ini; the wheel carries the notebooks as
`llmpapers/_nbs`"""

import shutil
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

root = Path(__file__).parent
ini = ConfigParser(delimiters=["="])
ini.read(root / "settings.ini", encoding="utf-8")
cfg = ini["DEFAULT"]
licenses = dict(apache2="Apache-2.0")


def reqs(key):
    return cfg.get(key, "").split()


extras = {k.removesuffix("_requirements"): reqs(k) for k in cfg if k.endswith("_requirements")}
extras["all"] = sorted({r for k, v in extras.items() if k != "dev" for r in v})


class BuildWithNotebooks(build_py):
    "Copy `nbs/` beside the modules, so that an installed package can run and open its notebooks"

    def run(self):
        super().run()
        if self.editable_mode:
            return
        dst = Path(self.build_lib) / "llmpapers" / "_nbs"
        shutil.rmtree(dst, ignore_errors=True)
        keep = shutil.ignore_patterns(".*", "_*", "nbdev.yml", "sidebar.yml")
        shutil.copytree(root / "nbs", dst, ignore=keep)

    def get_outputs(self, include_bytecode=1):
        nbs = Path(self.build_lib) / "llmpapers" / "_nbs"
        return super().get_outputs(include_bytecode) + [
            str(p) for p in nbs.rglob("*") if p.is_file()
        ]


readme = root / "README.md"
setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    license=licenses[cfg["license"]],
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    keywords=cfg["keywords"].split(),
    packages=find_packages(include=["llmpapers", "llmpapers.*"]),
    include_package_data=True,
    package_data={"llmpapers": ["data/*/*"]},
    install_requires=reqs("requirements"),
    extras_require=extras,
    python_requires=">=" + cfg["min_python"],
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else cfg["description"],
    long_description_content_type="text/markdown",
    cmdclass=dict(build_py=BuildWithNotebooks),
    zip_safe=False,
    entry_points=dict(
        console_scripts=["llmpapers=llmpapers.core.cli:main"],
        nbdev=[f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"],
    ),
)
