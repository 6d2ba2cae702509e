"""Counts every base whose configuration files ship, or are written by its family, and writes `data/counted.json`, which
a plan reads: `python tools/counted.py`. To be run again when a base's configuration or the engine's forward changes; a
test says so."""

import tempfile
from pathlib import Path

from collectionlora.bases.counted import entry_of
from collectionlora.bases.families import configured, FAMILIES
from collectionlora.bases.sizes import key_of
from collectionlora.core import data_dir, write_json

if __name__ == '__main__':
    folders = [path.parent for path in sorted(data_dir().glob('*/model_index.json'))]
    with tempfile.TemporaryDirectory() as place:
        folders += [configured(f.key, Path(place) / f.key) for f in FAMILIES if f.configuration]
        entries = {key_of(folder): {'base': folder.name, **entry_of(folder)} for folder in folders}
    write_json(data_dir() / 'counted.json', entries)
