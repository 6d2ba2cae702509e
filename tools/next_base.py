"""Lays out a base that is still being trained: `python tools/next_base.py assets/next_base/<name>.safetensors FOLDER`.

The file holds the transformer's weights in float16; everything else of the base is that of data/nano. A training of
`nbs/experiments/nano_base.ipynb` goes on from FOLDER with `-p start=FOLDER`."""

import shutil
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file

from collectionlora.core import nano_dir, read_json, write_json


def lay_out(weights: Path, folder: Path) -> Path:
    "The base as a pipeline folder in float32, with the samples that its record names."
    shutil.copytree(nano_dir(), folder)
    state = {name: tensor.float() for name, tensor in load_file(weights).items()}
    save_file(state, folder / 'transformer' / 'diffusion_pytorch_model.safetensors', metadata={'format': 'pt'})
    write_json(folder / 'training.json', read_json(weights.with_suffix('.json')))
    return folder


if __name__ == '__main__':
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    print(lay_out(Path(sys.argv[1]), Path(sys.argv[2])))
