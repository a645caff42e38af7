from setuptools import find_packages, setup

names = {"": "datasets"} | {f".{name}": f"datasets/{name.replace('.', '/')}" for name in find_packages("datasets")}
builders = {f"sarjax_datasets{name}": folder for name, folder in names.items()}
setup(packages=[*find_packages(include=["sarjax*"]), *builders], package_dir={"sarjax": "sarjax", **builders})
