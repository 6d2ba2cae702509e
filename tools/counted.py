"""Counts every base whose configuration files ship and writes `data/counted.json`, which a plan reads: `python
tools/counted.py`. To be run again when a base's configuration or the engine's forward changes; a test says so."""

from collectionlora.bases.counted import entry_of
from collectionlora.bases.sizes import key_of
from collectionlora.core import data_dir, write_json

if __name__ == '__main__':
    folders = [path.parent for path in sorted(data_dir().glob('*/model_index.json'))]
    write_json(data_dir() / 'counted.json', {key_of(folder): {'base': folder.name, **entry_of(folder)} for folder in folders})
