from setuptools import find_packages, setup

builders = find_packages("datasets")
folders = {"sarjax_datasets": "datasets"} | {f"sarjax_datasets.{b}": f"datasets/{b.replace('.', '/')}" for b in builders}
setup(packages=[*find_packages(include=["sarjax*"]), *folders], package_dir={"sarjax": "sarjax", **folders})
