"""Says what a wheel of this project holds; all else about the wheel is in pyproject.toml.

The folder conf/ becomes common/conf/ in a wheel: packages of all projects are installed side by side, and a folder conf
beside common/ could be that of another project. (The environment is made by install/setup.py.)
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["common", "common.*", "horovod_recipes", "recipes", "recipes.*"]), "common.conf"],
    package_dir={"common.conf": "conf"},
    package_data={"": ["py.typed"], "common.conf": ["*.yaml", "*/*.yaml"]},
    options={"build": {"build_base": ".build_cache"}},  # a hidden folder that `make clean` removes
)
