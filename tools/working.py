"""Writes data/working.json: on which share of unseen subjects each effect's own LoRA was good, from the run record.
Then the manifests of EffectBench-nano, whose effects are chosen by these shares.

`python tools/working.py`, after `collectionlora run nbs/experiments/single/effects_180.yaml` on the base that ships."""

from collectionlora.core import data_dir, read_json, results_dir, write_json
from collectionlora.judge.effectbench import write_all

RECORD = results_dir() / 'single' / 'effects_180.json'


def working() -> dict:
    "What the file says: the base's hash, pictures per effect, and the share of good ones per effect."
    record = read_json(RECORD)
    best = record['metrics']['table'][record['metrics']['best']]
    return {'base': record['run']['inputs']['base'], 'pictures': best['pictures'], 'good': best['good']}


if __name__ == '__main__':
    write_json(data_dir() / 'working.json', working())
    write_all(data_dir() / 'effectbench')
    print(data_dir() / 'working.json', data_dir() / 'effectbench')
