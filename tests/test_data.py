"Folders of effects with every mistake a folder can hold, and the condition cache under damage and interruption."

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from collectionlora import world
from collectionlora.bases.pipeline import load_base
from collectionlora.bases.tiny import tiny_base
from collectionlora.core import UserError, write_yaml
from collectionlora.files import conditions
from collectionlora.files.conditions import ConditionCache, Conditions
from collectionlora.files.drawn import pick_effects, write_world_effect
from collectionlora.files.effects import (
    general_pictures,
    load_effect,
    load_effects,
    load_general,
    load_image,
    write_effect,
    write_general,
)


def picture(seed, size=(64, 64)):
    noise = np.random.default_rng(seed).integers(0, 255, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.BICUBIC)


@pytest.fixture
def effect(tmp_path):
    return write_effect(
        tmp_path / 'fx' / 'one',
        id='one',
        category='animal',
        prompt='do it',
        pairs=[(picture(i), picture(i + 9)) for i in range(3)],
    )


@pytest.fixture(scope='module')
def base(tmp_path_factory):
    return load_base(tiny_base(tmp_path_factory.mktemp('tiny')))


# --- images
def test_upright_after_exif(tmp_path):
    image = Image.new('RGB', (6, 4), 'red')
    image.putpixel((0, 0), (0, 0, 255))
    exif = image.getexif()
    exif[0x0112] = 8  # a quarter turn to the left when shown
    image.save(tmp_path / 'a.png', exif=exif)
    shown = load_image(tmp_path / 'a.png')
    assert shown.size == (4, 6) and shown.getpixel((0, 5)) == (0, 0, 255)


@pytest.mark.parametrize(
    'mode, colour, expected',
    [('L', 9, (9, 9, 9)), ('1', 1, (255, 255, 255)), ('RGBA', (1, 2, 3, 255), (1, 2, 3)), ('LA', (7, 255), (7, 7, 7))],
)
def test_unambiguous_modes_are_converted_and_said(tmp_path, caplog, mode, colour, expected):
    Image.new(mode, (4, 4), colour).save(tmp_path / 'a.png')
    assert load_image(tmp_path / 'a.png').getpixel((1, 1)) == expected
    assert 'a.png' in caplog.text and 'converted' in caplog.text


def test_palette_with_and_without_transparency(tmp_path):
    image = Image.new('P', (4, 4), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.save(tmp_path / 'opaque.png')
    image.save(tmp_path / 'clear.png', transparency=1)
    assert load_image(tmp_path / 'opaque.png').getpixel((0, 0)) == (10, 20, 30)
    with pytest.raises(UserError, match='clear.png: has transparent pixels'):
        load_image(tmp_path / 'clear.png')


@pytest.mark.parametrize(
    'name, make, said',
    [
        ('a.png', lambda p: Image.new('RGBA', (4, 4), (0, 0, 0, 254)).save(p), 'transparent'),
        ('a.jpg', lambda p: Image.new('CMYK', (4, 4)).save(p), 'inks'),
        ('a.png', lambda p: Image.fromarray(np.zeros((4, 4), np.uint16)).save(p), '16-bit'),
        ('a.tif', lambda p: Image.fromarray(np.zeros((4, 4), np.float32)).save(p), '32-bit'),
        ('a.png', lambda p: p.write_bytes(b''), 'cannot be read'),
        ('a.png', lambda p: p.write_text('no image'), 'cannot be read'),
    ],
)
def test_ambiguous_or_broken_images_are_refused_by_name(tmp_path, name, make, said):
    make(tmp_path / name)
    with pytest.raises(UserError, match=f'{name}.*{said}'):
        load_image(tmp_path / name)


@pytest.mark.parametrize('keep', [10, 60, 200])
def test_truncated_image(tmp_path, keep):
    picture(0).save(tmp_path / 'a.png')
    (tmp_path / 'b.png').write_bytes((tmp_path / 'a.png').read_bytes()[:keep])
    with pytest.raises(UserError, match='b.png'):
        load_image(tmp_path / 'b.png')


# --- effect folders
def test_sources_alone_can_be_distilled_and_not_taught(effect):
    from collectionlora.engine.finetune import examples

    with_targets = effect.hash
    shutil.rmtree(effect.folder / 'target')
    alone = load_effect(effect.folder)
    assert len(alone) == len(effect) and not alone.targets and 'sources' in repr(alone) and alone.hash != with_targets
    with pytest.raises(UserError, match='has no target/'):
        examples(alone)


MISTAKES = {
    'no manifest': (lambda f: (f / 'effect.yaml').unlink(), r'has no effect\.yaml'),
    'unknown key': (
        lambda f: write_yaml(f / 'effect.yaml', {'id': 'one', 'category': 'a', 'prompt': 'x', 'triger': 'y'}),
        "'triger'.*'trigger'",
    ),
    'no prompt': (lambda f: write_yaml(f / 'effect.yaml', {'id': 'one', 'category': 'a'}), "'prompt' is missing"),
    'empty prompt': (
        lambda f: write_yaml(f / 'effect.yaml', {'id': 'one', 'category': 'a', 'prompt': '  '}),
        "'prompt' is empty",
    ),
    'number as prompt': (
        lambda f: write_yaml(f / 'effect.yaml', {'id': 'one', 'category': 'a', 'prompt': 7}),
        'must be text',
    ),
    'id with a slash': (
        lambda f: write_yaml(f / 'effect.yaml', {'id': '../x', 'category': 'a', 'prompt': 'p'}),
        'becomes a file name',
    ),
    'empty trigger': (
        lambda f: write_yaml(f / 'effect.yaml', {'id': 'one', 'category': 'a', 'prompt': 'p', 'trigger': ''}),
        "'trigger' is empty",
    ),
    'no YAML': (lambda f: (f / 'effect.yaml').write_text('id: [one'), 'not valid YAML'),
    'no target': (lambda f: (f / 'target' / '0001.png').unlink(), r'source/0001\.png: has no partner target/0001'),
    'no source': (lambda f: (f / 'source' / '0002.png').unlink(), r'target/0002\.png: has no partner source/0002'),
    'no pairs': (lambda f: [p.unlink() for p in f.glob('*/*.png')], 'holds no images'),
    'no folder': (lambda f: shutil.rmtree(f / 'source'), 'no such folder'),
    'strange file': (lambda f: (f / 'source' / 'notes.txt').write_text('hm'), r'notes\.txt: is not one of'),
    'same stem': (lambda f: picture(1).save(f / 'source' / '0001.jpg'), 'same stem'),
    'other size': (lambda f: picture(1, (64, 32)).save(f / 'target' / '0001.png'), r'target/0001\.png: is 64x32'),
    'broken image': (lambda f: (f / 'target' / '0001.png').write_bytes(b'x'), r'target/0001\.png: cannot be read'),
    'wrong mode': (
        lambda f: Image.new('RGBA', (64, 64)).save(f / 'source' / '0001.png'),
        r'source/0001\.png: has transparent',
    ),
}


@pytest.mark.parametrize('mistake', MISTAKES)
def test_mistakes_in_an_effect_folder(effect, mistake):
    change, said = MISTAKES[mistake]
    change(effect.folder)
    with pytest.raises(UserError, match=said):
        load_effect(effect.folder)


def test_hidden_files_do_not_count(effect):
    (effect.folder / 'source' / '.DS_Store').write_bytes(b'x')
    (effect.folder / 'target' / 'Thumbs.db').write_bytes(b'x')
    assert load_effect(effect.folder).hash == effect.hash


def test_ids_and_triggers_are_unique_but_prompts_need_not_be(effect):
    other = lambda **kw: write_effect(
        effect.folder.parent / 'two', pairs=[(picture(5), picture(6))], category='animal', prompt='do it', **kw
    )
    other(id='two')
    assert [e.prompt for e in load_effects(effect.folder.parent)] == ['do it', 'do it']
    shutil.rmtree(effect.folder.parent / 'two')
    other(id='ONE')
    with pytest.raises(UserError, match="(?i)id 'one' is also"):
        load_effects(effect.folder.parent)
    shutil.rmtree(effect.folder.parent / 'two')
    other(id='two', trigger='Zorvik')
    write_effect(
        effect.folder.parent / 'three',
        id='three',
        category='a',
        prompt='p',
        trigger='zorvik',
        pairs=[(picture(5), picture(6))],
    )
    with pytest.raises(UserError, match='trigger'):
        load_effects(effect.folder.parent)


def test_hashes_tell_pairs_from_words(effect):
    described = write_effect(
        effect.folder,
        id='one',
        category='animal',
        prompt='do it',
        description='in detail',
        pairs=[(picture(i), picture(i + 9)) for i in range(3)],
    )
    assert described.pairs_hash == effect.pairs_hash and described.hash != effect.hash
    picture(77).save(effect.folder / 'target' / '0000.png')
    assert load_effect(effect.folder).pairs_hash != effect.pairs_hash


def test_write_effect_replaces_only_its_own(effect, tmp_path):
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine' / 'thesis.txt').write_text('years')
    for folder in (tmp_path / 'mine', effect.folder):
        with pytest.raises(UserError, match='choose another folder'):
            write_effect(folder, id='two', category='a', prompt='p', pairs=[(picture(0), picture(1))])
    assert (tmp_path / 'mine' / 'thesis.txt').is_file() and load_effect(effect.folder).hash == effect.hash


def test_half_written_effect_is_no_effect(tmp_path):
    with pytest.raises(UserError):
        write_effect(tmp_path / 'a', id='a', category='a', prompt='p', pairs=[(picture(0), picture(1, (32, 64)))])
    assert not (tmp_path / 'a').exists()


# --- the general stream
@pytest.mark.parametrize(
    'line, said',
    [
        ('{"image": "images/00000.png"}', "line 2: 'prompt'"),
        ('{"image": "x.png", "prompt": "a"}', "'x.png' does not exist"),
        ('{"image": "images/00000.png", "promt": "a"}', "did you mean 'prompt'"),
        ('{"image":', 'not valid JSON'),
        ('7', 'must be'),
    ],
)
def test_mistakes_in_a_general_folder(tmp_path, line, said):
    write_general(tmp_path, [(picture(0), 'make it blue')])
    with open(tmp_path / 'manifest.jsonl', 'a') as f:
        f.write(line + '\n')
    with pytest.raises(UserError, match=said):
        load_general(tmp_path)


def test_general_folder_roundtrip(tmp_path):
    with pytest.raises(UserError, match='manifest.jsonl'):
        load_general(tmp_path)
    written = write_general(tmp_path, [(picture(0), 'a', {'x': 1}), (np.asarray(picture(1)), 'b')])
    assert load_general(tmp_path) == written and [c for _, c in written] == ['a', 'b']
    assert list(general_pictures(tmp_path).values()) == [{'x': 1}, None]


# --- the world's effects
def test_collections_are_nested_and_pairs_numbered(tmp_path):
    orders = [pick_effects(n, 5) for n in (1, 7, len(world.EFFECTS))]
    assert orders[2][:7] == orders[1] and orders[1][:1] == orders[0] and set(orders[2]) == set(world.EFFECTS)
    few = write_world_effect(tmp_path / 'a', orders[0][0], 2, seed=1)
    more = write_world_effect(tmp_path / 'b', orders[0][0], 4, seed=1)
    other = write_world_effect(tmp_path / 'c', orders[0][0], 2, seed=2)
    bytes_of = lambda e: [p.read_bytes() for p in (*e.sources[:2], *e.targets[:2])]
    assert bytes_of(few) == bytes_of(more) != bytes_of(other)
    spec = json.loads(few.specs[0].read_text())
    assert np.array_equal(world.render(spec), np.asarray(load_image(few.sources[0])))
    with pytest.raises(UserError, match='did you mean'):
        write_world_effect(tmp_path / 'd', orders[0][0] + 'x', 2, 0)


# --- the condition cache
def test_cache_equals_the_base_and_is_read_back(base, effect, tmp_path):
    pairs = [(p, c) for p in effect.sources for c in ('do it', 'make the cat red please', ' ')]
    cold, warm = ConditionCache(base, tmp_path / 'c'), ConditionCache(base, tmp_path / 'c')
    a = cold.cond(pairs)
    direct = base.cond([load_image(p) for p, _ in pairs], [c for _, c in pairs])
    assert torch.allclose(a.emb, direct.emb, atol=1e-5) and torch.allclose(a.source, direct.source, atol=1e-5)
    assert torch.equal(a.mask, direct.mask) and a.grids == direct.grids
    b = warm.cond(pairs)
    assert torch.equal(a.emb, b.emb) and torch.equal(a.source, b.source) and warm.encoded == 0


def test_an_entry_does_not_depend_on_its_batch(base, effect, tmp_path):
    pairs = [(p, c) for p in effect.sources for c in ('do it', 'make the cat red please')]
    together, alone = ConditionCache(base, tmp_path / 'a'), ConditionCache(base, tmp_path / 'b', batch=1)
    together.warm(pairs)
    for p, c in reversed(pairs):
        alone.warm([(p, c)])
    assert torch.equal(together.cond(pairs).emb, alone.cond(pairs).emb) and torch.equal(
        together.latents(effect.sources), alone.latents(effect.sources)
    )


@pytest.mark.parametrize('damage', [lambda b: b[:-1], lambda b: b[:4], lambda b: b'', lambda b: b'\xff' * len(b)])
def test_damaged_entries_are_computed_again(base, effect, tmp_path, damage):
    pairs = [(p, 'do it') for p in effect.sources]
    first = ConditionCache(base, tmp_path / 'c')
    good = first.cond(pairs)
    files = sorted((tmp_path / 'c').rglob('*.safetensors'))
    for f in files[:2]:
        f.write_bytes(damage(f.read_bytes()))
    second = ConditionCache(base, tmp_path / 'c')
    again = second.cond(pairs)
    assert second.encoded == 2 and torch.equal(again.emb, good.emb) and torch.equal(again.source, good.source)


def test_interrupted_warming_keeps_what_it_had(base, effect, tmp_path, monkeypatch):
    pairs, calls = [(p, 'do it') for p in effect.sources], []

    def encode(self, *args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self, *args)

    original = type(base).encode_prompts
    monkeypatch.setattr(type(base), 'encode_prompts', encode)
    cache = ConditionCache(base, tmp_path / 'c', batch=1)
    with pytest.raises(KeyboardInterrupt):
        cache.warm(pairs)
    assert not list((tmp_path / 'c').rglob('*.part'))
    assert ConditionCache(base, tmp_path / 'c').warm(pairs) == 1


def test_keys_follow_content_not_names(base, effect, tmp_path):
    cache = ConditionCache(base, tmp_path / 'c')
    cache.warm([(p, 'do it') for p in effect.sources])
    copy = tmp_path / 'elsewhere.png'
    shutil.copy(effect.sources[0], copy)
    assert cache.warm([(copy, 'do it')]) == 0
    assert cache.warm([(copy, 'do it.')]) == 1  # another wording
    picture(50).save(copy)
    assert cache.warm([(copy, 'do it')]) == 2  # another picture under the same name: latents and embeddings
    with pytest.raises(UserError, match='no such file'):
        cache.latents([tmp_path / 'gone.png'])


def test_flip_is_the_mirrored_image(base, effect, tmp_path):
    cache, mirrored = ConditionCache(base, tmp_path / 'c'), tmp_path / 'm.png'
    load_image(effect.sources[0]).transpose(Image.FLIP_LEFT_RIGHT).save(mirrored)
    assert torch.equal(cache.latents(effect.sources[:1], flip=True), cache.latents([mirrored]))
    assert torch.equal(cache.uncond(effect.sources[:1], flip=True).emb, cache.uncond([mirrored]).emb)


def test_one_grid_per_call_and_memory_is_bounded(base, effect, tmp_path):
    cache, wide = ConditionCache(base, tmp_path / 'c', memory=5000), tmp_path / 'wide.png'
    picture(3, (160, 64)).save(wide)
    assert cache.grid(wide) != cache.grid(effect.sources[0])
    with pytest.raises(UserError, match='different batches'):
        cache.latents([effect.sources[0], wide])
    expected = ConditionCache(base, tmp_path / 'c').cond([(p, 'do it') for p in effect.sources])
    assert torch.equal(cache.cond([(p, 'do it') for p in effect.sources]).emb, expected.emb)
    assert cache._memory.bytes <= 5000 or len(cache._memory.kept) == 1


def test_a_full_disk_is_one_sentence_and_what_is_encoded_stays(base, effect, tmp_path, monkeypatch):
    from safetensors import SafetensorError

    pairs, calls, original = [(p, 'do it') for p in effect.sources], [], conditions.save_file

    def full(*args, **kw):
        calls.append(1)
        if len(calls) == 5:
            raise SafetensorError('I/O error: No space left on device')
        original(*args, **kw)

    monkeypatch.setattr(conditions, 'save_file', full)
    with pytest.raises(UserError, match='No space left.*make room'):
        ConditionCache(base, tmp_path / 'c', batch=1).warm(pairs)
    monkeypatch.undo()
    assert not list((tmp_path / 'c').rglob('*.part')) and ConditionCache(base, tmp_path / 'c').warm(pairs) == 2


def test_a_full_cache_serves_a_base_without_encoders(tmp_path, effect):
    import weakref

    own = load_base(tiny_base(tmp_path / 'tiny'))
    pairs = [(p, 'do it') for p in effect.sources]
    before = ConditionCache(own, tmp_path / 'c')
    before.warm(pairs, images=effect.targets)
    cond, encoder, held = before.cond(pairs), weakref.ref(own.pipe.text_encoder), own.encoder_bytes
    assert own.drop_encoders() == held > 0 == own.encoder_bytes == own.drop_encoders() and encoder() is None
    after = ConditionCache(own, tmp_path / 'c')
    assert after.warm(pairs, images=effect.targets) == 0 and torch.equal(after.cond(pairs).emb, cond.emb)
    assert len(own.decode(after.latents(effect.targets), (8, 8))) == 3
    with pytest.raises(UserError, match="'something new'.*warm the cache"):
        after.cond([(effect.sources[0], 'something new')])
    own.load_encoders()
    own.load_encoders()
    assert own.encoder_bytes == held and torch.equal(ConditionCache(own, tmp_path / 'd').cond(pairs).emb, cond.emb)
    assert torch.equal(ConditionCache(own, tmp_path / 'd').latents(effect.targets), after.latents(effect.targets))


def test_what_encodes_is_part_of_the_key(base, effect, tmp_path, monkeypatch):
    cache = ConditionCache(base, tmp_path / 'c')
    cache.warm([(effect.sources[0], 'do it')])
    monkeypatch.setattr(type(base), 'encoding', property(lambda self: 'another resizer'))
    assert cache.warm([(effect.sources[0], 'do it')]) == 2


def test_rows_are_read_when_they_are_drawn_and_are_the_same_to_the_bit(base, effect, tmp_path):
    pairs = [(p, c) for p in effect.sources for c in ('do it', 'make the cat red please')]
    cache = ConditionCache(base, tmp_path / 'c', memory=5000)
    cache.warm(pairs)
    rows, whole = Conditions(cache, pairs), cache.cond(pairs)
    for at in ([2, 0], [1, 3, 1], [0]):
        a, b = rows.index(at), whole.index(at)
        assert (
            torch.equal(a.emb, b.emb)
            and torch.equal(a.source, b.source)
            and a.grids == b.grids
            and (a.mask is None) == (b.mask is None)
            and (a.mask is None or torch.equal(a.mask, b.mask))
        )
    assert (
        len(rows) == len(pairs)
        and torch.equal(rows.index(3).emb, whole.index(3).emb)
        and (cache._memory.bytes <= 5000 or len(cache._memory.kept) == 1)
    )


def test_a_grid_is_read_from_the_header_and_a_file_without_the_tensor_is_made_again(base, effect, tmp_path):
    from safetensors.torch import save_file

    pairs = [(p, 'do it') for p in effect.sources]
    whole = ConditionCache(base, tmp_path / 'c').cond(pairs)
    cache = ConditionCache(base, tmp_path / 'c')
    assert cache.grid(effect.sources[0]) == whole.grids[0] and not cache._memory.kept
    save_file({'other': torch.zeros(1)}, next((tmp_path / 'c').rglob('*.safetensors')))
    assert ConditionCache(base, tmp_path / 'c').warm(pairs) == 1 and torch.equal(cache.cond(pairs).emb, whole.emb)


def test_a_drawn_row_outlives_its_picture_and_never_becomes_another(base, effect, tmp_path):
    picture_of = tmp_path / 'p.png'
    shutil.copy(effect.sources[0], picture_of)
    first = ConditionCache(base, tmp_path / 'c')
    first.warm([(picture_of, 'do it')])

    def fresh():
        return Conditions(ConditionCache(base, tmp_path / 'c', memory=0), [(picture_of, 'do it')])

    expected, damaged = fresh().index(0), fresh()
    for f in (tmp_path / 'c').rglob('*.safetensors'):
        f.write_bytes(f.read_bytes()[:-1])
    assert torch.equal(damaged.index(0).emb, expected.emb)  # a truncated entry is made again from the picture
    rows = fresh()
    picture(50).save(picture_of)
    assert torch.equal(rows.index(0).emb, expected.emb) and torch.equal(rows.index(0).source, expected.source)
    for f in (tmp_path / 'c').rglob('*.safetensors'):
        f.unlink()
    rows.cache._memory.kept.clear()  # the last entry stays in memory, however little there is
    with pytest.raises(UserError, match='p.png.*gone or damaged.*put the picture back.*last checkpoint'):
        rows.index(0)
