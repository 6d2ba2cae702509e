"Extending a collection: the parent is read and kept, what does not fit is refused, what the old effects lost is measured."

from dataclasses import replace

import pytest

from collectionlora.core import sha256_file, UserError
from collectionlora.engine.settings import resolved, schedule_of, Settings
from collectionlora.files.header import catalogue, read_header
from collectionlora.files.lora import read_lora, write_lora
from collectionlora.flow import few_step_times
from collectionlora.use import extend as ext

from test_distill import make_world, open_world, run, SMALL

SHORT = dict(batch=2, fake_per_generator=1, fake_warmup=0, rank_fake=2, ema=0.5, lr_warmup=0, lr_student=0.01, steps=2)


@pytest.fixture(scope='module')
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp('world')
    args = open_world(folder, make_world(folder))
    yield args
    args[1].close()


@pytest.fixture(scope='module')
def parent(world, tmp_path_factory):
    base, bank, effects, general, cache = world
    out = tmp_path_factory.mktemp('parent')
    run((base, bank, effects[:1], general, cache), replace(SMALL, steps=2, rank_student=3), out)
    return ext.read_parent(out / 'collection.safetensors', base)


def test_a_parent_knows_what_its_file_says(world, parent):
    base, _, effects, _, _ = world
    assert list(parent.entries) == ['one'] and parent.rank == 3 and parent.sha256 == sha256_file(parent.file)
    assert parent.times == pytest.approx(schedule_of(resolved(SMALL, base.info['shift'])))
    assert effects[0].trigger in parent.prompt('one') and 'turn it into one' in parent.prompt('one')


@pytest.mark.parametrize('steps, shift', [(1, 1.0), (4, 1.0), (8, 3.0), (5, 2.2)])
def test_the_shift_is_found_from_the_levels(steps, shift):
    assert ext.shift_of(few_step_times(steps, shift)) == pytest.approx(1.0 if steps == 1 else shift)


def test_a_child_is_sampled_as_its_parent(parent):
    s = ext.child_settings(parent, dict(SHORT, few_shift=ext.shift_of(parent.times)))
    assert (
        schedule_of(s) == pytest.approx(list(parent.times)) and s.init == parent.file.as_posix() and s.rank_student == 3
    )
    assert ext.child_settings(parent, dict(SHORT, rank_student=5)).rank_student == 5
    for given, words in (
        (dict(few_steps=3), 'few_steps'),
        (dict(few_shift=1.3), 'few_shift'),
        (dict(rank_student=2), 'rank 3'),
        (dict(stesp=3), "'steps'"),
    ):
        with pytest.raises(UserError, match=words):
            ext.child_settings(parent, {**SHORT, **given})


def test_a_truncated_schedule_of_the_authors_is_close_enough_to_be_extended(world, parent, tmp_path):
    header = {k: v for k, v in read_header(parent.file).items() if not k.endswith(('schema', 'sha256'))}
    times = schedule_of(Settings.preset('authors'))
    write_lora(
        tmp_path / 'a.safetensors',
        read_lora(parent.file),
        header | {'collectionlora.sampling': {'steps': 8, 'shift': 3.0, 'times': times, 'stochastic': True}},
    )
    authors = ext.read_parent(tmp_path / 'a.safetensors', world[0])
    assert ext.child_settings(authors, dict(SHORT, few_shift=3.0)).few_steps == 8


def test_the_family_is_new_effects_and_rehearsed_old_ones_under_the_words_that_the_weights_know(world, parent):
    _, _, (one, two), _, _ = world
    both = ext.family(parent, [two], [replace(one, description='Other words.', trigger='other')])
    assert (
        [e.id for e in both] == ['two', 'one']
        and both[1].trigger == one.trigger
        and both[1].description == 'Turn it into one.'
    )
    for args, words in (
        (([],), 'nothing to add'),
        (([one],), "'one' is already in"),
        (([replace(two, trigger=one.trigger)],), 'cannot be told'),
        (([two], [two]), 'cannot be rehearsed'),
    ):
        with pytest.raises(UserError, match=words):
            ext.family(parent, *args)


def test_files_that_cannot_be_extended(world, parent, tmp_path):
    header = {k: v for k, v in read_header(parent.file).items() if not k.endswith(('schema', 'sha256'))}
    broken = {
        'catalogue': {k: v for k, v in header.items() if k != 'collectionlora.effects'},
        'empty': header | {'collectionlora.effects': []},
        'times or steps': {k: v for k, v in header.items() if k != 'collectionlora.sampling'},
        'base': header | {'collectionlora.base': {'hash': '0' * 64}},
        'guidance': header | {'collectionlora.sampling': {'steps': 8, 'stochastic': False, 'cfg': 4.0}},
    }
    for words, said in broken.items():
        write_lora(tmp_path / 'x.safetensors', read_lora(parent.file), said)
        with pytest.raises(UserError, match=words):
            ext.read_parent(tmp_path / 'x.safetensors', world[0])


@pytest.fixture(scope='module')
def child(world, parent, tmp_path_factory):
    "Effect two added, effect one rehearsed, at a larger rank."
    base, bank, (one, two), general, cache = world
    out = tmp_path_factory.mktemp('child')
    run(
        (base, bank, ext.family(parent, [two], [one]), general, cache),
        ext.child_settings(parent, dict(SHORT, rank_student=4)),
        out,
    )
    return out / 'collection.safetensors'


def test_the_child_lists_all_effects_and_its_parents(world, parent, child):
    header = read_header(child)
    assert [e['id'] for e in catalogue(child)] == ['one', 'two'] and read_lora(child).rank == 4
    first, *teachers = header['collectionlora.parents']
    assert first == {'sha256': parent.sha256, 'kind': 'start', 'effects': ['one']}
    assert {(p['kind'], p['effect'], p['sha256']) for p in teachers} == {
        ('teacher', id, world[1].shas[id]) for id in ('one', 'two')
    }
    assert ext.read_parent(child, world[0]).entries.keys() == {'one', 'two'}  # it can be a parent itself


def test_what_was_lost_is_measured_per_old_effect_and_nothing_by_the_parent_itself(world, parent, child):
    base, _, (one, two), general, cache = world
    known, unknown = ext.probes(parent, cache, [one], [], 2), ext.probes(parent, cache, [], [p for p, _ in general], 3)
    assert (
        len(known[0].cond) == 2
        and known[0].targets.shape[0] == 3
        and len(unknown[0].cond) == 3
        and unknown[0].targets is None
    )
    (line,) = ext.regressions(base, parent, child, known)
    assert line['id'] == 'one' and line['drift'] > 0 and line['distance_before'] != line['distance_after']
    (same,) = ext.regressions(base, parent, parent.file, unknown)
    assert (
        same == {'id': 'one', 'n': 3, 'drift': 0.0, 'detail_before': 1.0, 'detail_after': 1.0}
        and 'looked_at' not in base.backbone.roles
    )
    with pytest.raises(UserError, match="'one': no pictures"):
        ext.probes(parent, cache, [two], [], 2)


def test_a_foreign_lora_without_a_catalogue_can_still_be_a_start(world, tmp_path):
    base, bank, effects, general, cache = world
    b = base.backbone
    b.add_role('foreign', 2, seed=3)
    write_lora(tmp_path / 'foreign.safetensors', b.lora('foreign'))
    b.remove('foreign')
    run(
        (base, bank, effects, general, cache),
        replace(SMALL, steps=1, fake_warmup=0, init=str(tmp_path / 'foreign.safetensors')),
        tmp_path / 'out',
    )
    assert read_header(tmp_path / 'out' / 'collection.safetensors')['collectionlora.parents'][0]['effects'] == []
