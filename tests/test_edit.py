"Using a collection: strict loading, fixed seeds, mixed batches, composition, strength, and equality with the stock pipeline."

import base64
import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from collectionlora.bases.pipeline import load_base
from collectionlora.bases.tiny import tiny_base
from collectionlora.core import collection_dir, UserError
from collectionlora.files.conditions import ConditionCache
from collectionlora.files.dialects import Lora, lora_hash
from collectionlora.files.header import catalogue, file_sha256
from collectionlora.files.lora import read_lora, write_lora
from collectionlora.flow import few_step_times
from collectionlora.judge.gate import Item
from collectionlora.judge.methods import Method, run_method
from collectionlora.use import edit, sheet
from collectionlora.use.plain import fixed_noise, plain_pipeline

SAMPLING = dict(steps=8, shift=3.0, times=few_step_times(8, 3.0), stochastic=True, cfg=1.0)
EFFECTS = [
    dict(id='oil', category='animal', trigger='zorvik', description='an oil painting with short strokes', strength=1.0),
    dict(id='snow', category='animal', trigger='quompa', description='deep snow', strength=1.0),
]


def picture(k, size=(64, 64)):
    return Image.fromarray(np.random.default_rng(k).integers(0, 255, (*size[::-1], 3), dtype=np.uint8))


def collection_file(path, base, **header):
    "A file of random LoRA weights, strong enough to matter."
    g = torch.Generator().manual_seed(0)
    factors = {
        n: (torch.randn(4, i, generator=g) / 4, 0.1 * torch.randn(o, 4, generator=g))
        for n, (i, o) in base.backbone.modules().items()
    }
    full = {
        'collectionlora.base': dict(hash=base.hash),
        'collectionlora.effects': EFFECTS,
        'collectionlora.sampling': SAMPLING,
        **header,
    }
    write_lora(path, Lora(factors, {}), {k: v for k, v in full.items() if v is not None})
    return path


@pytest.fixture(scope='module')
def base(tmp_path_factory):
    torch.set_num_threads(1)
    return load_base(tiny_base(tmp_path_factory.mktemp('base')))


@pytest.fixture(scope='module')
def file(base, tmp_path_factory):
    return collection_file(tmp_path_factory.mktemp('file') / 'collection.safetensors', base)


@pytest.fixture
def collection(base, file):
    c = edit.Collection(base, file)
    yield c
    c.close()


def latents(base, c, images, effects, seeds, batch=16):
    return torch.stack(
        [
            o.latents
            for o in edit.generate(base, c.role, images, [c.prompt(e) for e in effects], seeds, c.recipe, batch=batch)
        ]
    )


def test_effects_lists_the_catalogue(collection):
    assert [e['id'] for e in collection.effects()] == ['oil', 'snow']
    assert set(collection.effects()[0]) == {'id', 'category', 'trigger', 'description', 'strength'}


def test_prompts_and_composition(collection):
    one, two = collection.prompt('oil'), collection.prompt('snow')
    assert one.startswith('zorvik, an oil painting')
    for chained in (collection.prompt(('oil', 'snow')), collection.prompt('oil+snow'), collection.prompt('oil + snow')):
        assert chained.index('zorvik') < chained.index('quompa') and one in chained and two in chained


def test_one_forward_for_many_effects_and_pictures(base, collection, monkeypatch):
    calls, real = [], base.backbone.transformer.forward
    monkeypatch.setattr(
        base.backbone.transformer, 'forward', lambda *a, **k: calls.append(len(k['hidden_states'])) or real(*a, **k)
    )
    images = [picture(k) for k in range(4)]
    mixed = latents(base, collection, images, ['oil', 'snow', 'oil+snow', 'snow'], [1, 2, 3, 4])
    assert calls == [4] * 8  # eight steps, all four pictures in each
    for i, effect in enumerate(['oil', 'snow', 'oil+snow', 'snow']):
        alone = latents(base, collection, images[i : i + 1], [effect], [i + 1])
        assert (alone[0] - mixed[i]).abs().max() < 1e-4
    small = latents(base, collection, images, ['oil', 'snow', 'oil+snow', 'snow'], [1, 2, 3, 4], batch=3)
    assert (small - mixed).abs().max() < 1e-4


def test_fixed_seed_fixed_picture(collection):
    a, b, c = (np.asarray(collection.edit(picture(0), 'oil', seed=s), int) for s in (5, 5, 6))
    assert np.array_equal(a, b) and not np.array_equal(a, c)


def test_single_and_list_arguments(collection):
    assert isinstance(collection.edit(picture(0), 'oil'), Image.Image)
    assert (
        len(collection.edit(picture(0), ['oil', 'snow'])) == 2
        and len(collection.edit(picture(0), 'oil', seed=[1, 2, 3])) == 3
    )
    with pytest.raises(UserError, match='2 effects for 3 pictures'):
        collection.edit([picture(k) for k in range(3)], ['oil', 'snow'])


def test_pictures_of_different_shapes_keep_their_ratio(base, tmp_path_factory):
    wide, square = picture(0, (256, 64)), picture(1)
    outputs = edit.generate(base, 'base', [wide, square], ['a', 'b'], [0, 1], edit.Recipe.few(2))
    assert [o.image.size for o in outputs] == [base.size(i)[::-1] for i in (wide, square)]
    assert outputs[0].image.size != outputs[1].image.size


def test_grey_and_paths_are_read_and_bad_modes_refused(collection, tmp_path):
    picture(0).save(tmp_path / 'a.png')
    assert np.array_equal(collection.edit(tmp_path / 'a.png', 'oil'), collection.edit(picture(0), 'oil'))
    with pytest.raises(UserError, match='no such file'):
        collection.edit(tmp_path / 'b.png', 'oil')
    with pytest.raises(UserError, match='transparent'):
        collection.edit(Image.new('RGBA', (64, 64), (0, 0, 0, 9)), 'oil')


@pytest.mark.parametrize(
    'bad, hint', [('oi', "did you mean 'oil'"), ('snow+oik', "did you mean 'oil'"), ('zzz', 'known: oil, snow')]
)
def test_unknown_effect(collection, bad, hint):
    with pytest.raises(UserError, match='no effect') as e:
        collection.edit(picture(0), bad)
    assert hint in str(e.value) and 'collection.safetensors' in str(e.value)


def test_strength(base, collection):
    image, calls = picture(0), []

    def at(s, neutral=' '):
        return edit.generate(
            base, collection.role, [image], [collection.prompt('oil')], [3], collection.recipe, [s], neutral
        )[0].latents

    without = edit.generate(base, collection.role, [image], [' '], [3], collection.recipe)[0].latents
    plain = latents(base, collection, [image], ['oil'], [3])[0]
    assert (at(0.0) - without).abs().max() < 1e-4 and torch.equal(at(1.0), plain)
    assert (plain - without).abs().max() > 1e-3
    mixed = edit.generate(
        base, collection.role, [image] * 2, [collection.prompt('oil')] * 2, [3, 3], collection.recipe, [0.0, 1.0]
    )
    assert (mixed[0].latents - without).abs().max() < 1e-4 and (mixed[1].latents - plain).abs().max() < 1e-4


def test_blends_ask_their_roles_in_turn_or_all(base, collection, monkeypatch):
    image, recipe, asked, real = picture(3), edit.Recipe(4, 1.0), [], base.backbone.velocity

    def at(role):
        return edit.generate(base, role, [image], ['a cat'], [5], recipe)[0].latents

    alone = {role: at(role) for role in ('base', collection.role)}
    monkeypatch.setattr(base.backbone, 'velocity', lambda role, *a: asked.append(role) or real(role, *a))
    both = ('base', collection.role)
    made = {rule: at(edit.Blend(both, rule)) for rule in ('switch', 'composite')}
    assert asked == [*both] * 2 + [*both] * 4
    assert (
        all((m - a).abs().max() > 1e-3 for m in made.values() for a in alone.values())
        and (made['switch'] - made['composite']).abs().max() > 1e-3
    )
    assert (at(edit.Blend((collection.role,) * 3, 'composite')) - alone[collection.role]).abs().max() < 1e-4
    for bad in (lambda: edit.Blend(both, 'mean'), lambda: edit.Blend((), 'switch')):
        with pytest.raises(UserError, match='composite'):
            bad()
    assert Method('m', lambda e: edit.Blend(both, 'composite'), str, edit.Recipe.ode(3), passes=2).nfe == 12


def test_a_finished_file_shows_and_explains_itself(base, tmp_path):
    file = collection_file(tmp_path / 'c.safetensors', base)
    before = read_lora(file)
    beside = edit.present(base, file, {'oil': picture(1, (80, 64)), 'snow': picture(2)}, side=32, seed=4)
    assert (
        {p.name for p in beside}
        == {'c.README.md', 'c.html', 'c.comfyui.json', 'c.prompts.txt'}
        == {p.name for p in tmp_path.iterdir()} - {'c.safetensors'}
    )
    entries, sha = {e['id']: e for e in catalogue(file)}, file_sha256(file)
    assert (
        lora_hash(read_lora(file)) == lora_hash(before)
        and sha in beside[0].read_text()
        and 'presented' not in base.backbone.roles
    )
    for id, image in (('oil', picture(1, (80, 64))), ('snow', picture(2))):
        shot = Image.open(io.BytesIO(base64.b64decode(entries[id]['thumbnail'].split(',')[1])))
        c = edit.Collection(base, file)
        want = c.edit(image, id, seed=entries[id]['example_seed'])
        c.close()
        want.thumbnail((32, 32), Image.LANCZOS)
        assert (
            shot.size == want.size
            and np.abs(np.asarray(shot, int) - np.asarray(want.convert('RGB'), int)).mean() < 20
            and entries[id]['example_seed'] == 4
        )
        assert entries[id]['thumbnail'] in (tmp_path / 'c.html').read_text()
    edit.present(base, file, {'oil': picture(1, (80, 64)), 'snow': picture(2)}, side=32, seed=4)
    assert file_sha256(file) == sha
    with pytest.raises(UserError, match="did you mean 'oil'"):
        edit.present(base, file, {'oi': picture(1)})
    assert 'presented' not in base.backbone.roles


def test_a_file_is_presented_from_cached_conditions_without_encoders(base, tmp_path):
    pictures = {id: tmp_path / f'{id}.png' for id in ('oil', 'snow')}
    for k, (path, size) in enumerate(zip(pictures.values(), ((80, 64), (64, 64)))):
        picture(k, size).save(path)
    files = [collection_file(tmp_path / f'{n}.safetensors', base) for n in ('asked', 'cached')]
    edit.present(base, files[0], pictures, side=32)
    cache = ConditionCache(base, tmp_path / 'cache')
    with edit.Collection(base, files[1]) as shown:
        cache.warm([(path, shown.prompt(id)) for id, path in pictures.items()])
    base.drop_encoders()
    try:
        edit.present(base, files[1], pictures, side=32, conditions=cache)
    finally:
        base.load_encoders()
    shots = [[e['thumbnail'] for e in catalogue(f)] for f in files]
    assert shots[0] == shots[1] and len(shots[0]) == 2


@pytest.mark.parametrize('stochastic', [True, False])
def test_same_picture_through_the_stock_pipeline(base, tmp_path, stochastic):
    file = collection_file(
        tmp_path / 'c.safetensors', base, **{'collectionlora.sampling': SAMPLING | {'stochastic': stochastic}}
    )
    pipe, collection = plain_pipeline(base.folder, file), edit.Collection(base, file)
    assert pipe.scheduler.config.stochastic_sampling == stochastic
    image, prompt = picture(7), collection.prompt('snow')
    h, w = base.size(image)
    with torch.random.fork_rng(devices=[]):
        theirs = pipe(
            image=[image],
            prompt=prompt,
            height=h,
            width=w,
            num_inference_steps=8,
            true_cfg_scale=1.0,
            output_type='np',
            **fixed_noise(base, image, 11),
        ).images[0]
    made = latents(base, collection, [image], ['snow'], [11])
    ours = base.decode(made, base.grid(image), 'np')[0]
    assert np.abs(theirs - ours).max() < 1e-5
    bare = edit.generate(base, 'base', [image], [prompt], [11], collection.recipe)[0].latents
    assert (bare - made[0]).abs().max() > 1e-3  # the LoRA was there
    collection.close()


def test_irregular_times_need_sigmas(base, tmp_path):
    file = collection_file(
        tmp_path / 'c.safetensors',
        base,
        **{'collectionlora.sampling': dict(steps=3, times=[1.0, 0.8, 0.1], stochastic=True, cfg=1.0)},
    )
    c = edit.Collection(base, file, role='irregular')
    assert c.recipe.times == (1.0, 0.8, 0.1) and c.edit(picture(0), 'oil').size == (64, 64)
    with pytest.raises(UserError, match=r'sigmas=\[1.0, 0.8, 0.1\]'):
        c.sampler_config()
    c.close()


def test_file_of_another_base(base, file, tmp_path):
    other = load_base(tiny_base(tmp_path / 'other', seed=3))
    with pytest.raises(UserError) as e:
        edit.Collection(other, file)
    assert (
        base.hash[:12] in str(e.value) and other.hash[:12] in str(e.value) and 'collection.safetensors' in str(e.value)
    )
    assert '`--base` in the shell' in str(e.value)  # what to type, for who did not call from Python
    assert edit.Collection(other, file, allow_other_base=True).edit(picture(0), 'oil').size == (64, 64)


@pytest.mark.parametrize(
    'field, message', [('collectionlora.effects', 'no catalogue'), ('collectionlora.sampling', 'sampling')]
)
def test_files_without_catalogue_or_recipe(base, tmp_path, field, message):
    before = set(base.backbone.roles)
    with pytest.raises(UserError, match=message):
        edit.Collection(base, collection_file(tmp_path / 'c.safetensors', base, **{field: None}), role='incomplete')
    assert set(base.backbone.roles) == before


def test_nan_is_an_error_in_edit_and_a_missing_picture_in_generate(base, collection, monkeypatch):
    real = base.backbone.velocity

    def broken(role, x, t, cond):
        v = real(role, x, t, cond).clone()
        v[-1] = float('nan')
        return v

    monkeypatch.setattr(base.backbone, 'velocity', broken)
    made = edit.generate(base, collection.role, [picture(0), picture(1)], ['a', 'b'], [0, 1], collection.recipe)
    assert made[0].image is not None and made[1].image is None
    with pytest.raises(UserError, match="effect 'snow' is not finite"):
        collection.edit([picture(0), picture(1)], ['oil', 'snow'])


def test_methods_share_noise_and_group_by_effect(base, collection):
    items = [Item(e, 'animal', f'i{k}', 0, np.asarray(picture(k))) for k in range(2) for e in ('oil', 'snow')]
    used = []

    def role(e):
        used.append(e)
        return collection.role

    own = Method('own', lambda e: collection.role, collection.prompt, collection.recipe)
    switched = Method('switched', role, collection.prompt, collection.recipe, shared=False)
    a, b = (run_method(base, m, items)[0] for m in (own, switched))
    assert used == ['oil', 'snow'] and max((x.latents - y.latents).abs().max() for x, y in zip(a, b)) < 1e-4


def test_recipes():
    assert (
        edit.Recipe.few().nfe == 8 and edit.Recipe.ode(40).nfe == 80 and edit.Recipe.ode(40).words == '40 steps × CFG'
    )
    read = edit.Recipe.read({'collectionlora.sampling': dict(times=[1.0, 0.5], stochastic=False, cfg=2.0)}, 'f')
    assert read.times == (1.0, 0.5, 0.0) and read.nfe == 4
    with pytest.raises(UserError, match='f: header field collectionlora.sampling'):
        edit.Recipe.read({}, 'f')


def test_results_keep_the_ratio_and_have_the_size_that_is_asked(base, collection):
    wide = picture(0, (300, 150))
    working, ratio, original = (collection.edit(wide, 'oil', size=s) for s in ('working', 'ratio', 'original'))
    assert working.size == collection.working_size(wide) == base.size(wide)[::-1] and original.size == (300, 150)
    assert abs(ratio.width / ratio.height - 2) < 0.1 and collection.edit(wide, 'oil').size == ratio.size
    made = latents(base, collection, [picture(1)], ['oil'], [0])
    exact = base.decode(made, base.grid(picture(1)))[0]
    assert all(np.array_equal(collection.edit(picture(1), 'oil', size=s), exact) for s in ('ratio', 'working'))
    with pytest.raises(UserError, match="did you mean 'original'"):
        collection.edit(wide, 'oil', size='orignal')


@pytest.mark.parametrize(
    'made, original, wanted',
    [
        ((64, 64), (1200, 800), (78, 52)),
        ((1248, 832), (1201, 800), (1248, 832)),
        ((64, 64), (64, 64), (64, 64)),
        ((128, 32), (2000, 20), (640, 6)),
    ],
)
def test_a_shape_is_mended_only_where_one_would_see_it(made, original, wanted):
    assert sheet.fitted_size(made, original) == wanted
    assert sheet.fitted_size(made, original, 'original') == original


@pytest.mark.parametrize(
    'given, words',
    [
        (dict(image=np.zeros((64, 64, 3), np.uint8)), r'array of shape \(64, 64, 3\) and type uint8'),
        (dict(image=7), 'is a int; give a path'),
        (dict(seed=1.5), 'seed is 1.5'),
        (dict(seed=-1), 'seed is -1'),
        (dict(seed=[0, 'a']), "seed is 'a'"),
        (dict(seed=True), 'seed is True'),
        (dict(strength='much'), "strength is 'much'"),
        (dict(strength=float('nan')), 'strength is nan'),
        (dict(image=[]), 'list of pictures is empty'),
        (dict(image=[picture(0), picture(1)], effect=['oil', 'snow', 'oil']), '2 pictures for 3 effects'),
        (dict(image=[picture(0), picture(1)], seed=[1, 2, 3]), '2 pictures for 3 seeds'),
        (dict(effect=['oil', 'snow'], strength=[1.0, 0.5, 2.0]), '2 effects for 3 strengths'),
        (dict(batch=0), 'batch is 0'),
        (dict(batch=1.5), 'batch is 1.5'),
        (dict(neutral=None), 'neutral is None'),
        (dict(effect=()), 'is no effect'),
        (dict(effect=[['oil']]), 'is no effect'),
    ],
)
def test_wrong_arguments_are_one_sentence(collection, given, words):
    with pytest.raises(UserError, match=words):
        collection.edit(**{'image': picture(0), 'effect': 'oil', **given})


def test_numpy_numbers_and_tuples_of_pictures_are_taken(collection):
    pair = (picture(0), picture(1))
    made = collection.edit(pair, 'oil', seed=(np.int64(3), 4), strength=np.float32(1))
    for together, p, s in zip(made, pair, (3, 4)):  # the last bit may depend on how many share a forward
        alone = collection.edit(p, 'oil', seed=s)
        assert np.abs(np.asarray(together, int) - np.asarray(alone, int)).max() <= 1


def test_two_collections_on_one_base_do_not_meet(base, file, collection):
    before = np.asarray(collection.edit(picture(0), 'oil'))
    with edit.Collection.load(base, file) as second, edit.Collection.load(base, file) as third:
        assert len({collection.role, second.role, third.role}) == 3
        assert np.array_equal(second.edit(picture(0), 'oil'), before)
        assert np.array_equal(collection.edit(picture(0), 'oil'), before)
    assert not {second.role, third.role} & set(base.backbone.roles)
    third.close()  # closing twice is no mistake
    with pytest.raises(UserError, match='taken'):
        edit.Collection(base, file, role=collection.role)


def test_a_file_speaks_without_a_base(file, collection):
    said = edit.CollectionFile(file)
    assert said.effects() == collection.effects() and said.prompt('oil+snow') == collection.prompt('oil+snow')
    assert repr(said) == '<CollectionFile collection.safetensors: 2 effects (oil, snow), 8 steps>'
    assert repr(collection).startswith('<Collection ') and collection.base.folder.name in repr(collection)


def test_every_picture_with_every_effect_and_seed(collection, tmp_path):
    for folder in ('a', 'b'):
        (tmp_path / folder).mkdir()
        picture(ord(folder), (80, 40)).save(tmp_path / folder / 'cat.png')
    paths = [tmp_path / f / 'cat.png' for f in ('a', 'b')]
    edits = edit.edit_all(collection, paths, ['oil', 'oil+snow'], seeds=[0, 5], strength=0.5, size='original', batch=3)
    assert [(e.picture, e.effect, e.seed) for e in edits] == [
        (p, e, s) for p in ('cat', 'cat-2') for e in ('oil', 'oil+snow') for s in (0, 5)
    ]
    alone = collection.edit(paths[1], 'oil+snow', seed=5, strength=0.5, size='original')
    assert np.abs(np.asarray(edits[-1].image, int) - np.asarray(alone, int)).max() <= 1
    files = edit.save_edits(edits, tmp_path / 'out')
    assert len(set(files)) == 8 and files[0].name == 'cat-oil-0-strength0.5.png'
    assert all(Image.open(f).size == (80, 40) for f in files)
    assert edit.names_of([*paths, tmp_path / 'cat-2.png']) == ['cat', 'cat-2', 'cat-2-2']
    assert [e.name for e in edit.edit_all(collection, paths[:1], ['oil', 'oil'])] == ['cat-oil-0.png']
    everything = edit.edit_all(collection, paths[:1])
    assert [e.effect for e in everything] == ['oil', 'snow'] and everything[0].name == 'cat-oil-0.png'
    with pytest.raises(UserError, match='no picture'):
        edit.edit_all(collection, [])
    with pytest.raises(UserError, match="did you mean 'snow'"):
        edit.edit_all(collection, paths, ['snwo'])


def test_a_sheet_shows_the_original_beside_every_result(collection):
    edits = edit.edit_all(collection, [picture(0)], ['oil', 'snow'], seeds=[0, 1])
    shown, side = edit.sheet_of(edits, 64), 64
    left, top = shown.width - 3 * (side + sheet.GAP), shown.height - 2 * (side + sheet.GAP)
    for row, seed in enumerate((0, 1)):
        found = [e for e in edits if e.seed == seed]
        for column, wanted in enumerate((picture(0), found[0].image, found[1].image)):
            at = left + column * (side + sheet.GAP), top + row * (side + sheet.GAP)
            assert np.array_equal(shown.crop((*at, at[0] + side, at[1] + side)), wanted), (row, column)


def test_on_a_sheet_original_and_result_have_one_size_and_rows_are_no_higher_than_they_need():
    wide, made = Image.new('RGB', (120, 64), 'red'), Image.new('RGB', (75, 40), 'blue')
    shown = np.asarray(sheet.contact_sheet([[wide, made], [wide, made]], ['original', 'oil'], side=192))
    for colour in ((255, 0, 0), (0, 0, 255)):
        rows, columns = np.nonzero((np.abs(shown.astype(int) - colour).sum(2) < 9))
        assert np.ptp(columns) + 1 == 192 and np.ptp(rows) + 1 == 102 + sheet.GAP + 102


def test_the_working_size_is_said_and_a_miniature_says_what_it_is(collection):
    said = edit.working_words(collection, [picture(0, (400, 200)), picture(1), picture(2)])
    assert '400 × 200 pixels are edited at' in said and 'no photographs' in said and said.count('returned at') == 2


def test_the_package_offers_its_two_names_without_loading_torch():
    code = (
        'import sys, collectionlora as c\n'
        'assert not {"torch", "diffusers", "numpy"} & set(sys.modules)\n'
        'assert {"Collection", "load_base"} <= set(dir(c)) & set(c.__all__)\n'
        'from collectionlora.use.edit import Collection, open_base\n'
        'assert c.Collection is Collection and c.load_base is open_base\n'
        'assert not hasattr(c, "Colection")'
    )
    subprocess.run([sys.executable, '-c', code], check=True)
    assert (Path(edit.__file__).parents[1] / 'py.typed').is_file()


def test_a_base_that_is_no_folder_is_named_with_what_to_give():
    file = collection_dir() / 'collection.safetensors'
    for base in ('nope', file):
        with pytest.raises(UserError, match="is no folder of a base; give a pipeline's folder, or 'nano'"):
            edit.Collection.load(base, file)


def test_the_name_of_a_result_is_no_path_whatever_a_catalogue_says():
    for id in ('x/../../../evil', '..\\..\\evil', 'a\0b'):
        made = edit.Edit('cat', id, 0, None, image=None, source=None)
        assert Path(made.name).name == made.name and '\\' not in made.name and '\0' not in made.name


def test_results_of_one_name_get_different_files(tmp_path):
    im = Image.new('RGB', (8, 8))
    edits = [edit.Edit('a', 'star-dust', 0, None, im, im), edit.Edit('a-star', 'dust', 0, None, im, im)]
    assert [p.name for p in edit.save_edits(edits, tmp_path)] == ['a-star-dust-0.png', 'a-star-dust-0-2.png']
    long = edit.Edit('a', '+'.join('e' * 64 for _ in range(4)), 0, None, im, im)
    assert len(long.name) < 120 and edit.save_edits([long], tmp_path)[0].is_file()


def test_a_result_replaces_no_picture_that_is_edited_and_a_sheet_no_result(tmp_path):
    from collectionlora.use.results import check_results

    im = Image.new('RGB', (8, 8))
    edits = [edit.Edit('cat', 'lava', 0, None, None, im)]
    with pytest.raises(UserError, match='cat-lava-0.png is one of the pictures to edit'):
        check_results(edits, [tmp_path / 'cat-lava-0.png'], tmp_path)
    with pytest.raises(UserError, match='name of a result'):
        check_results(edits, [tmp_path / 'cat.png'], tmp_path, tmp_path / 'cat-lava-0.png')
    check_results(edits, [tmp_path / 'cat.png'], tmp_path, tmp_path / 'sheet.png')


def test_a_closed_collection_edits_nothing(base, collection):
    other = edit.Collection(base, collection.file)
    other.close()
    third = edit.Collection(base, collection.file)
    with pytest.raises(UserError, match='was closed'):
        other.edit(picture(0), 'oil')
    other.close()
    assert np.array_equal(third.edit(picture(0), 'oil'), collection.edit(picture(0), 'oil'))
    third.close()
