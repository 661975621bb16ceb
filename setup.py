from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["nemokernels*"]), "nemokernels.models", "nemokernels.train"]
)
