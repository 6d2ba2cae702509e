from setuptools import setup
setup(name='collectionlora', version='0.1.0', packages=['collectionlora'])
