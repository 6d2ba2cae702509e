"Held-out items, reference policies, contestants from files, and the honest path without an oracle."

import numpy as np
import pytest
import torch

from collectionlora import world
from collectionlora.bases.pipeline import load_base
from collectionlora.bases.tiny import tiny_base
from collectionlora.core import UserError
from collectionlora.files.dialects import Lora
from collectionlora.files.effects import write_effect
from collectionlora.files.lora import write_lora
from collectionlora.judge import evaluate as V, tables
from collectionlora.judge.gate import gate, judge
from collectionlora.use.edit import Collection, Recipe

EFFECTS = {'oil_painting': 'animal', 'confetti_party': 'animal', 'stone_statue': 'portrait'}


@pytest.fixture(scope='module')
def base(tmp_path_factory):
    torch.set_num_threads(1)
    return load_base(tiny_base(tmp_path_factory.mktemp('base')))


def lora_file(path, base, effects, sampling=True, seed=0):
    g = torch.Generator().manual_seed(seed)
    factors = {
        n: (torch.randn(4, i, generator=g) / 4, 0.1 * torch.randn(o, 4, generator=g))
        for n, (i, o) in base.backbone.modules().items()
    }
    entries = [
        dict(
            id=e,
            category=c,
            trigger=f'trigger{k}',
            description=world.describe(e),
            teacher_prompt=world.EFFECTS[e].prompt,
        )
        for k, (e, c) in enumerate(effects.items())
    ]
    header = {'collectionlora.base': dict(hash=base.hash), 'collectionlora.effects': entries}
    write_lora(
        path,
        Lora(factors, {}),
        header | ({'collectionlora.sampling': dict(steps=2, shift=1.0, stochastic=True)} if sampling else {}),
    )
    return path


@pytest.fixture(scope='module')
def files(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp('files')
    teachers = {
        e: lora_file(folder / f'{e}.safetensors', base, {e: c}, False, k) for k, (e, c) in enumerate(EFFECTS.items())
    }
    return dict(
        collection=lora_file(folder / 'collection.safetensors', base, EFFECTS, seed=7),
        acceleration=lora_file(folder / 'acc.safetensors', base, {}, seed=8),
        fm=lora_file(folder / 'fm.safetensors', base, EFFECTS, False, seed=9),
        teachers=teachers,
    )


def free(base):
    "Takes every role off a base."
    for role in list(base.backbone.roles):
        base.backbone.remove(role)


def test_items_are_crossed_and_depend_on_nothing_else():
    few, many = V.held_out(EFFECTS, 2), V.held_out(EFFECTS, 3, seeds=2)
    assert len(few) == 6 and len(many) == 18
    again = {(i.effect, i.image, i.seed): i for i in many}
    for i in few:
        j = again[i.effect, i.image, i.seed]
        assert (
            np.array_equal(i.source, j.source)
            and np.array_equal(i.truth, j.truth)
            and i.noise == j.noise
            and i.energy == j.energy
        )
    assert np.array_equal(few[0].source, few[2].source) and not np.array_equal(
        few[0].source, V.held_out(EFFECTS, 2, seed=1)[0].source
    )
    assert len({i.noise for i in many}) == 18


def test_unknown_effect_or_category():
    with pytest.raises(UserError, match="did you mean 'oil_painting'"):
        V.held_out({'oil_paintin': 'animal'}, 1)
    with pytest.raises(UserError, match="did you mean 'animal'"):
        V.held_out({'oil_painting': 'animals'}, 1)
    assert V.in_world(EFFECTS) and not V.in_world(['mine'])


def test_references_are_floor_and_ceiling():
    items = V.held_out(EFFECTS, 2)
    shown = V.references(items)
    oracle = world.Oracle(list(EFFECTS), draws=12, strangers=6)
    rows = {name: judge(name, items, pictures, oracle, 0.0, 0) for name, pictures in shown.items()}
    assert (
        gate(rows[tables.COPY])['bcr'] == 1
        and gate(rows[tables.FLOOR])['bcr'] == 1
        and gate(rows[tables.CEILING])['bcr'] <= 1 / 3
    )
    assert gate(rows[tables.CEILING])['kept'] > 0.5 and np.mean([r.distance for r in rows[tables.CEILING]]) < np.mean(
        [r.distance for r in rows[tables.FLOOR]]
    )


def test_contestants_follow_from_the_files(base, files):
    collection = Collection(base, files['collection'])
    tuned = {'fm_acc': 0.5, 'teacher_acc': 0.25}
    given = (files['teachers'], files['acceleration'], files['fm'])
    every = V.assemble(base, collection, *given, Recipe.ode(2), tuned=tuned)
    stacks = ['teacher_acc', 'teacher_acc_tuned', 'fm_few', 'fm_acc', 'fm_acc_tuned']
    assert list(every) == ['base', 'teacher', 'teacher_few', *stacks, 'ours']
    assert [n for n in every if not n.endswith('_tuned')] == list(V.ALL)
    assert [m.recipe.nfe for m in every.values()] == [4, 4, 8, 2, 2, 8, 2, 2, 2]
    assert every['fm_acc_tuned'].name.startswith('all-in-one FM + acceleration × 0.5, ')
    size = lambda p: p.stat().st_size
    sizes = V.file_sizes(every, files['collection'], files['teachers'], files['acceleration'], files['fm'])
    assert (
        sizes[every['teacher_acc'].name] == sum(map(size, files['teachers'].values())) + size(files['acceleration'])
        and every['base'].name not in sizes
    )
    assert sizes[every['teacher_acc_tuned'].name] == sizes[every['teacher_acc'].name]
    items = V.held_out(EFFECTS, 1)
    rows, made = V.evaluate(base, every, items, V.oracle_for(base, EFFECTS, draws=8, strangers=4), batch=2)
    groups = tables.by_method(rows)
    assert list(groups) == [*(m.name for m in every.values()), *tables.REFERENCES, tables.ENCODED] and all(
        len(g) == 3 for g in groups.values()
    )
    pictures = [np.stack([np.asarray(o.image, int) for o in outs]) for outs in made.values()]
    assert all(np.abs(a - b).max() > 0 for i, a in enumerate(pictures) for b in pictures[:i])  # all of them differ
    tables.table(rows)
    free(base)


def test_wanted_methods_need_their_files(base, files):
    collection = Collection(base, files['collection'])
    assert list(V.assemble(base, collection, wanted=['ours'])) == ['ours']
    with pytest.raises(UserError, match="'fm_acc' needs files"):
        V.assemble(base, collection, wanted=['fm_acc'])
    with pytest.raises(UserError, match="did you mean 'teacher'"):
        V.assemble(base, collection, wanted=['teachr'])
    with pytest.raises(UserError, match="tuned: unknown key 'ours'"):
        V.assemble(base, collection, tuned={'ours': 0.5})
    assert list(V.assemble(base, collection, tuned={'fm_acc': 0.5}, wanted=['ours'])) == ['ours']
    free(base)


def test_without_ground_truth_it_says_so(base, files, tmp_path):
    collection = Collection(base, files['collection'])
    truth = V.held_out({'oil_painting': 'animal'}, 3)
    effect = write_effect(
        tmp_path / 'oil', id='oil_painting', category='animal', prompt='oil', pairs=[(i.source, i.truth) for i in truth]
    )
    items = V.user_items([effect], images=2)
    assert len(items) == 2 and items[0].spec is None
    with pytest.raises(UserError, match='no known truth'):
        judge('m', items, [i.source for i in items], None, 0.0, 0)
    lines, made = V.evaluate_sets(base, V.assemble(base, collection, wanted=['ours']), items, [effect])
    assert (
        lines[0]['n'] == 2 and 0 < lines[0]['ceiling'] and 0 < lines[0]['floor'] and 'cannot be computed' in V.NO_ORACLE
    )
    columns, pictures = V.read_pictures(V.save_pictures(tmp_path / 'pictures', items, made, 1))
    assert columns == ['source', 'target', 'ours, 2 steps'] and len(pictures) == 3
    free(base)
