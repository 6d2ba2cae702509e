"Packaging; every value lives in settings.ini. The papermill notebooks and the nano base travel inside the package."

import configparser
import shlex
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
config = configparser.ConfigParser(delimiters=['='], interpolation=None)
config.read(ROOT / 'settings.ini', encoding='utf-8')
cfg = config['DEFAULT']
extras = ('', 'dev_', 'eval_', 'docs_', 'slurm_', 'photographs_', 'serve_', 'app_', 'deployment_', 'study_', 'quantise_')
requirements = {k: shlex.split(cfg[f'{k}requirements']) for k in extras}

setup(
    name=cfg['lib_name'],
    version=cfg['version'],
    description=cfg['description'],
    long_description=(ROOT / 'README.md').read_text(encoding='utf-8')
    if (ROOT / 'README.md').exists()
    else cfg['description'],
    long_description_content_type='text/markdown',
    author=cfg['author'],
    license='Apache-2.0',
    license_files=['LICENSE'],
    keywords=cfg['keywords'],
    python_requires=f'>={cfg["min_python"]}',
    packages=[
        *find_packages(include=[cfg['lib_name'], f'{cfg["lib_name"]}.*']),
        f'{cfg["lib_name"]}._nbs',
        f'{cfg["lib_name"]}._data',
    ],
    package_dir={
        cfg['lib_name']: cfg['lib_path'],
        f'{cfg["lib_name"]}._nbs': f'{cfg["nbs_path"]}/experiments',
        f'{cfg["lib_name"]}._data': 'data',
    },
    package_data={
        cfg['lib_name']: ['py.typed'],
        f'{cfg["lib_name"]}._nbs': ['*.ipynb', '**/*.yaml'],
        f'{cfg["lib_name"]}._data': cfg['shipped_data'].split(),
    },
    include_package_data=False,
    install_requires=requirements[''],
    extras_require={k.rstrip('_'): v for k, v in requirements.items() if k},
    entry_points={'console_scripts': shlex.split(cfg['console_scripts'])},
    zip_safe=False,
)
