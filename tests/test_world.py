"The world's measuring instruments: verdicts on planted cases, effects that honour their numbers, and bad input in one clear sentence."

import importlib
import json
import shutil

import numpy as np
import pytest

from collectionlora import core, world
from collectionlora.bases.pipeline import load_base
from collectionlora.bases.tiny import tiny_base
from collectionlora.core import rng, UserError

IDS = ['sticker', 'confetti_party', 'little_army']


@pytest.fixture(scope='module')
def oracle():
    return world.Oracle(IDS, draws=16, strangers=6)


@pytest.fixture(scope='module', params=IDS)
def case(request, oracle):
    s = world.draw_scene(rng('test world', request.param), 'animal', 'heldout')
    made = world.planted(
        s, request.param, IDS[IDS.index(request.param) - 1], rng('test world, planted', request.param), 8
    )
    return s, request.param, made, dict(zip(made, oracle.verdicts(list(made.values()), s, request.param)))


def test_true_targets_pass_and_what_is_none_fails(case):
    _, id, _, seen = case
    assert (
        seen['true target']['applied'] and seen['true target']['predicted'] == id and seen['true target']['flaw'] == ''
    )
    for k in ('source, unedited', "other effect's target", 'another scene'):
        assert not seen[k]['applied'], k
    assert seen['source, unedited']['predicted'] == 'none'


@pytest.mark.parametrize(
    'which, flaws',
    [
        ('mean of 8 targets', {'mean', 'blur'}),
        ('blurred target', {'mean', 'blur'}),
        ('noisy target', {'noise'}),
        ('tinted target', {'warm'}),
    ],
)
def test_flaws_are_caught_and_named(case, which, flaws):
    v = case[3][which]
    assert not v['applied'] and v['distance'] > world.TAU and v['flaw'] in flaws


def test_distance_falls_as_an_effect_grows(case, oracle):
    s, id, made, _ = case
    d = [
        oracle.distance(((1 - a) * made['source, unedited'] + a * made['true target']).astype(np.uint8), s, id)
        for a in (0, 0.5, 1)
    ]
    assert d[0] > d[1] > d[2]


def test_a_stranger_scores_lower_as_a_subject(case, oracle):
    s, id, made, _ = case
    assert oracle.subject(made['true target'], s, id) >= 0.5 > oracle.subject(made['stranger, same scene'], s, id)


def test_one_picture_or_many_and_two_oracles_agree(case):
    s, id, made, seen = case
    again = world.Oracle(IDS, draws=16, strangers=6).score(made['blurred target'], s, id)
    assert {k: again[k] for k in ('predicted', 'applied', 'flaw')} == {
        k: seen['blurred target'][k] for k in ('predicted', 'applied', 'flaw')
    }
    assert again['distance'] == pytest.approx(seen['blurred target']['distance'], rel=1e-5) and set(again) == {
        'predicted',
        'applied',
        'distance',
        'flaw',
        'subject',
    }


@pytest.mark.parametrize('n', [1, 2, 4, 6, 9, 12])
def test_a_crowd_has_the_number_it_is_asked_for(n):
    s = world.draw_scene(rng('crowd'), 'animal')
    scale = s['subjects'][0]['scale']
    world.OPS['crowd'](s, rng('crowd', n), n)
    assert len(s['subjects']) == n and all(
        0 < a['x'] < 1 and 0 < a['y'] < 1 and a['scale'] < scale for a in s['subjects']
    )


def test_six_of_a_crowd_stand_as_they_always_did():
    assert world.grid_spots(6) == [(x, y, 0.42) for y in (0.42, 0.78) for x in (0.2, 0.5, 0.8)]


@pytest.mark.parametrize('id', list(world.EFFECTS))
def test_every_effect_changes_what_can_be_seen(id):
    s = world.draw_scene(rng('seen', id), world.EFFECTS[id].categories[0])
    r = rng('seen, target', id)
    a, b = (np.abs(world.apply_effect(s, id, r).astype(int) - world.render(s)).mean() for _ in range(2))
    assert min(a, b) > 2


def test_unknown_names_are_refused_in_one_sentence():
    with pytest.raises(UserError, match="unknown effect 'stickr'; did you mean 'sticker'"):
        world.apply_effect(world.draw_scene(rng(0), 'animal'), 'stickr', rng(0))
    with pytest.raises(UserError, match="unknown effect 'stickr'"):
        world.Oracle(['sticker', 'stickr'])
    with pytest.raises(UserError, match="unknown category 'animals'; use one of animal, portrait"):
        world.draw_scene(rng(0), 'animals')
    with pytest.raises(UserError, match="unknown stratum 'test'; use one of train, heldout, ood"):
        world.draw_scene(rng(0), 'animal', 'test')
    with pytest.raises(UserError, match="unknown family 'recolour'; did you mean 'recolor'"):
        world.random_edit(world.draw_scene(rng(0), 'animal'), rng(0), 'recolour')


def test_only_scenes_out_of_distribution_are_stylised():
    r = rng('strata')
    seen = {t: [world.draw_scene(r, c, t) for _ in range(30) for c in world.CATEGORIES] for t in world.STRATA}
    assert (
        not any(s['style'] for t in ('train', 'heldout') for s in seen[t])
        and 5 < sum(bool(s['style']) for s in seen['ood']) < 30
    )
    assert 20 < sum(len(s['subjects']) == 2 for s in seen['ood']) < 45


@pytest.fixture(scope='module')
def base_folder(tmp_path_factory):
    return tiny_base(tmp_path_factory.mktemp('base'))


def weights(folder):
    return next(folder.glob('*.safetensors'))


def halve(file):
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])


def without(file, *keys):
    "Rewrites a file of tensors without those whose name ends in one of `keys`."
    from safetensors.torch import load_file, save_file

    tensors = load_file(file)
    left = {k: v for k, v in tensors.items() if not k.endswith(keys)}
    assert len(left) < len(tensors)
    save_file(left, file, {'format': 'pt'})


def edit_json(file, change):
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))


BREAK = {
    'no transformer weights': (lambda d: weights(d / 'transformer').unlink(), 'transformer: has no'),
    'half of the transformer': (
        lambda d: halve(weights(d / 'transformer')),
        r'transformer/\w+.safetensors: missing or damaged',
    ),
    'no text encoder': (lambda d: weights(d / 'text_encoder').unlink(), 'text_encoder: has no'),
    'half of the text encoder': (
        lambda d: halve(weights(d / 'text_encoder')),
        r'text_encoder/\w+.safetensors: missing or damaged',
    ),
    'half of the autoencoder': (lambda d: halve(weights(d / 'vae')), r'vae/\w+.safetensors: missing or damaged'),
    'no autoencoder': (lambda d: shutil.rmtree(d / 'vae'), 'vae: missing or empty'),
    'a broken config': (
        lambda d: (d / 'transformer' / 'config.json').write_text('{"a":'),
        'transformer/config.json: not valid JSON',
    ),
    'half of the tokenizer': (
        lambda d: halve(d / 'tokenizer' / 'tokenizer.json'),
        'tokenizer/tokenizer.json: not valid JSON',
    ),
    'half of the processor': (
        lambda d: halve(next((d / 'processor').glob('*processor_config.json'))),
        r'processor/\w+.json: not valid JSON',
    ),
    'a part that the index leaves out': (
        lambda d: edit_json(d / 'model_index.json', lambda v: v.pop('vae')),
        'model_index.json: names no vae',
    ),
    'a tensor less in the text encoder': (
        lambda d: without(weights(d / 'text_encoder'), 'layers.1.mlp.up_proj.weight'),
        'text_encoder: its files hold',
    ),
    'a tensor less in the transformer': (
        lambda d: without(weights(d / 'transformer'), 'proj_out.weight'),
        'base: its parts do not fit together|transformer: its files hold',
    ),
    'a tensor less in the autoencoder': (
        lambda d: without(weights(d / 'vae'), 'conv_in.weight'),
        'base: its parts do not fit together|vae: its files hold',
    ),
    'a layer more than there are weights': (
        lambda d: edit_json(d / 'transformer' / 'config.json', lambda v: v.update(num_layers=3)),
        'transformer: its files have 2 blocks, config.json says 3',
    ),
    'a shard of three without an index': (
        lambda d: (file := weights(d / 'transformer')).rename(file.with_name('model-00002-of-00003.safetensors')),
        'transformer/model-00001-of-00003.safetensors: missing',
    ),
    'a transformer of another class': (
        lambda d: edit_json(d / 'model_index.json', lambda v: v['transformer'].__setitem__(1, 'FluxTransformer2DModel')),
        "names the transformer 'FluxTransformer2DModel', but a QwenImageEditPlusPipeline has",
    ),
    'another width than the weights': (
        lambda d: edit_json(d / 'transformer' / 'config.json', lambda v: v.update(joint_attention_dim=24)),
        'base: its parts do not fit together',
    ),
}


@pytest.mark.parametrize('damage', BREAK)
def test_a_damaged_base_folder_is_named(base_folder, tmp_path, damage):
    folder, (spoil, says) = tmp_path / 'base', BREAK[damage]
    shutil.copytree(base_folder, folder)
    spoil(folder)
    with pytest.raises(UserError, match=says) as told:
        load_base(folder)
    assert '\n' not in str(told.value)


def test_a_base_of_ours_needs_its_picture_size(tmp_path):
    folder = tmp_path / 'nano'
    shutil.copytree(core.nano_dir(), folder)
    (folder / 'collectionlora.json').unlink()
    with pytest.raises(UserError, match='nano/collectionlora.json: missing'):
        load_base(folder)


def test_plain_diffusers_opens_the_folder_that_ships():
    from diffusers import QwenImageEditPlusPipeline

    importlib.import_module('collectionlora.bases.nano')  # its autoencoder is a class of ours
    pipe, ours = QwenImageEditPlusPipeline.from_pretrained(core.nano_dir()), load_base(core.nano_dir()).pipe
    for part in ('transformer', 'text_encoder', 'vae'):
        assert type(getattr(pipe, part)) is type(getattr(ours, part))
        assert all(
            (a == b).all()
            for a, b in zip(getattr(pipe, part).parameters(), getattr(ours, part).parameters(), strict=True)
        )


@pytest.mark.parametrize('module', ['collectionlora.nano', 'collectionlora.bases.nano'])
def test_a_base_opens_under_the_old_and_the_new_name_of_its_autoencoders_module(module, tmp_path):
    "Folders that were written before the modules moved into rooms say `collectionlora.nano`."
    from safetensors.torch import load_file

    from collectionlora.bases.nano import PatchPCA

    folder = shutil.copytree(core.nano_dir(), tmp_path / 'nano')
    edit_json(folder / 'model_index.json', lambda v: v.update(vae=[module, 'PatchPCA']))
    vae, shipped = load_base(folder).pipe.vae, load_file(weights(core.nano_dir() / 'vae'))
    assert type(vae) is PatchPCA and all((vae.get_parameter(n) == w).all() for n, w in shipped.items())


def test_the_base_that_ships_is_still_the_one_that_the_collection_was_made_for():
    from collectionlora.files.header import read_header

    made_for = read_header(core.data_dir() / 'collection' / 'collection.safetensors')['collectionlora.base']
    assert core.read_json(core.nano_dir() / 'model_index.json')['vae'] == ['collectionlora.bases.nano', 'PatchPCA']
    assert load_base(core.nano_dir()).hash == made_for['hash']


def test_a_broken_index_is_named(base_folder, tmp_path):
    folder = tmp_path / 'base'
    shutil.copytree(base_folder, folder)
    (folder / 'model_index.json').write_text('{')
    with pytest.raises(UserError, match='model_index.json: not valid JSON'):
        load_base(folder)


def test_the_cards_quote_their_records():
    for name, run in (('oracle', 'effects_180'), ('data_card', 'scenes_600')):
        folder = core.results_dir() / name
        record, card = json.loads((folder / f'{run}.json').read_text())['metrics'], (folder / f'{run}.md').read_text()
        if name == 'oracle':
            assert all(
                f'{v["applied"]["share"]:.3f} [{v["applied"]["low"]:.3f}, {v["applied"]["high"]:.3f}]' in card
                for v in record['table'].values()
            )
        else:
            assert all(h[:16] in card for h in record['fingerprints'].values()) and all(
                (folder / f'{run}-{f}.jpg').is_file() for f in record['families']
            )


def test_the_data_card_fits_what_ships():
    ships = json.loads((core.results_dir() / 'data_card' / 'scenes_600.json').read_text())['metrics']['ships']
    found = {
        p.name: core.sha256_folder(p) if p.is_dir() else core.sha256_file(p)
        for p in core.data_dir().iterdir()
        if p.name[0] != '.' and p.suffix != '.md'
    }
    assert {k: v['sha256'] for k, v in ships.items()} == found, (
        'run `collectionlora run nbs/experiments/data_card/scenes_600.yaml` again'
    )


@pytest.mark.parametrize(
    'spoil, says',
    [
        (lambda d: halve(d / 'encoders.safetensors'), 'encoders.safetensors: damaged'),
        (lambda d: edit_json(d / 'encoders.json', lambda v: v.pop('vocab')), 'vocab is None'),
        (lambda d: without(d / 'encoders.safetensors', 'weight'), 'encoders.safetensors: damaged or of other encoders'),
        (lambda d: (d / 'encoders.safetensors').unlink(), 'encoders.safetensors is absent'),
    ],
)
def test_a_damaged_second_opinion_is_named(tmp_path, spoil, says):
    from collectionlora.judge.second import Opinion

    shutil.copytree(core.data_dir() / 'second', tmp_path / 'second')
    spoil(tmp_path / 'second')
    with pytest.raises(UserError, match=says) as told:
        Opinion(tmp_path / 'second')
    assert '\n' not in str(told.value)


def test_the_second_opinion_that_ships_tells_true_targets_from_others():
    from collectionlora.judge.second import description, Opinion

    opinion, ids, near, far, named = Opinion(), list(world.EFFECTS), [], [], []
    for k in range(12):
        r = rng('opinion test', k)
        id, other = (ids[int(i)] for i in r.choice(len(ids), 2, replace=False))
        s = world.draw_scene(r, world.CATEGORIES[k % 2], 'heldout')
        a, b, c = world.apply_effect(s, id, r), world.apply_effect(s, id, r), world.apply_effect(s, other, r)
        near.append(opinion.distance([a], [b])[0])
        far.append(opinion.distance([a], [c])[0])
        said = opinion.says([a], [description(i, s) for i in (id, other, None)])[0]
        named.append(bool(said[0] > said[1:].max()))
    assert sum(n < f for n, f in zip(near, far)) >= 11 and sum(named) >= 10


FIXED = (
    'recolor',
    'replace',
    'wear',
    'unwear',
    'remove',
    'flip',
    'time',
    'weather',
    'expression',
    'pose',
    'pattern',
    'count',
    'keep',
)  # their words leave nothing open


@pytest.mark.parametrize('family', world.FAMILIES)
def test_drawn_again_an_edit_keeps_what_its_words_say(family):
    r, changed, fixed = (
        rng('again', family),
        [],
        lambda t: {k: v for k, v in world.read_scene(t).items() if k not in ('side', 'size')},
    )
    for k in range(8):
        while (
            e := world.random_edit(
                s := world.draw_scene(r, 'animal' if family == 'flip' else world.CATEGORIES[k % 2]), r, family
            )
        ) is None:
            pass
        before, t = json.dumps(e[1]), world.again(s, e[1], r)
        assert json.dumps(e[1]) == before and {**fixed(t), 'wearcolor': 0} == {**fixed(e[1]), 'wearcolor': 0}
        a, b, c = (x['subjects'][0] for x in (t, e[1], s))
        assert (a['x'] - c['x']) * (b['x'] - c['x']) >= 0 and (a['scale'] - c['scale']) * (b['scale'] - c['scale']) >= 0
        if family in FIXED:
            assert t == e[1]
        changed.append((world.render(t) != world.render(e[1])).any())
    assert any(changed) == (family not in FIXED)


def test_an_edit_is_followed_by_its_own_draws_alone():
    r = rng('followed')
    s = world.draw_scene(r, 'animal', 'heldout')
    hearts, stars = ({**s, 'particles': dict(kind=k, seed=1)} for k in list(world.PARTICLES)[:2])
    draws = lambda t, n=8: [world.render(world.again(s, t, r)) for _ in range(n)]
    H, S, own = draws(hearts), draws(stars), [world.render(s)]
    spoilt = [world.FLAWS['noise'](H[0], r), r.integers(0, 256, H[0].shape).astype(np.uint8), np.full_like(H[0], 128)]
    assert not any(world.followed(y, H, [S, own]) for y in spoilt)
    assert all(world.followed(y, H, [S, own]) for y in draws(hearts, 6)) and not any(
        world.followed(y, H, [S, own]) for y in draws(stars, 6)
    )
    assert not world.followed(own[0], H, [S, own]) and world.followed(own[0], own, [H, S])


def test_what_looks_alike_does_not_compete():
    s = world.draw_scene(rng('alike'), 'portrait')
    a, b = (
        {**s, 'subjects': [{**s['subjects'][0], 'wears': ['halo'], 'wearcolor': c}]}
        for c in ((200, 30, 30), (30, 30, 200))
    )
    pictures = [[world.render(x)] for x in (a, b)]
    assert (pictures[0][0] == pictures[1][0]).all() and world.followed(
        pictures[0][0], pictures[0], [pictures[1], [world.render(s)]]
    )


def test_a_look_that_a_notebook_and_its_module_add_is_the_same_look(tmp_path, monkeypatch):
    "The way of `world/effects`, *How to add an effect*: the cell runs in the notebook and again when the module loads."
    from collectionlora.world import styles

    monkeypatch.setitem(styles.LOOKS, 'wear', dict(styles.LOOKS['wear']))
    monkeypatch.syspath_prepend(tmp_path)
    cell = (
        'from collectionlora.world.styles import add_look\n\n\n'
        'def paper_boat(p, c):\n    p.poly([(0, -0.5), (0.15, -0.26), (-0.15, -0.26)], c)\n\n\n'
        "add_look('wear', 'paper boat', paper_boat)\n"
    )
    (tmp_path / 'boat_in_a_module.py').write_text(cell)
    (tmp_path / 'boat_in_a_cell.py').write_text(f'# a line more\n{cell}')
    (tmp_path / 'another_boat.py').write_text(cell.replace('-0.5', '-0.6'))
    first = importlib.import_module('boat_in_a_module').paper_boat
    importlib.import_module('boat_in_a_cell')
    assert styles.LOOKS['wear']['paper boat'] is first
    with pytest.raises(UserError, match="a wear called 'paper boat' already"):
        importlib.import_module('another_boat')
