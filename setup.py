"""Packaging: everything is read from settings.ini, the one place for version, requirements and extras."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

settings = ConfigParser(delimiters=["="])
settings.read(Path(__file__).parent / "settings.ini", encoding="utf-8")
settings = settings["DEFAULT"]

extras = {name.removesuffix("_requirements"): value.split()
          for name, value in settings.items() if name.endswith("_requirements")}
extras["all"] = sorted({requirement for group in extras.values() for requirement in group})

setup(
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    keywords=settings["keywords"],
    author=settings["author"],
    license="Apache-2.0",
    packages=find_packages(include=[settings["lib_path"], settings["lib_path"] + ".*"]),
    include_package_data=True,
    python_requires=">=" + settings["min_python"],
    install_requires=settings["requirements"].split(),
    extras_require=extras,
    entry_points={"console_scripts": settings["console_scripts"].split()},
    zip_safe=False,
)
