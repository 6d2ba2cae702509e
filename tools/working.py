"""Writes data/working.json: on which share of unseen subjects each effect's own LoRA was good, from the run records.
Then the manifests of EffectBench-nano, whose effects are chosen by these shares.

`python tools/working.py`, after `collectionlora run nbs/experiments/single/effects_40.yaml` and the run files that go on
from it, on the base that ships. An effect that no run has judged on this base is left out of the file."""

from collectionlora.core import data_dir, nano_dir, read_json, results_dir, UserError, write_json
from collectionlora.bases.pipeline import load_base
from collectionlora.judge.effectbench import write_all

FIELDS = ('pairs', 'guidances', 'sample_steps', 'images', 'strangers')  # what runs must share to be put together


def working() -> dict:
    """What the file says: the base's hash, pictures per effect, and the share of good ones per effect.

    Raises `UserError` if there is no record of this base, or if two were asked differently."""
    base = load_base(nano_dir()).hash
    records = [read_json(p) for p in sorted((results_dir() / 'single').glob('effects_*.json'))]
    records = [r for r in records if r['run']['inputs'].get('base') == base]
    asked = {str([r['run']['parameters'].get(f) for f in FIELDS]) for r in records}
    if len(asked) != 1:
        raise UserError(f'results/single: {len(asked)} ways of asking for base {base[:12]}; one is needed')
    best = [r['metrics']['table'][r['metrics']['best']] for r in records]
    good = {id: share for part in best for id, share in part['good'].items()}
    return {'base': base, 'pictures': best[0]['pictures'], 'good': good}


if __name__ == '__main__':
    write_json(data_dir() / 'working.json', working())
    write_all(data_dir() / 'effectbench')
    print(data_dir() / 'working.json', data_dir() / 'effectbench')
