"The chain's order and the commands around it: what is asked wrongly is said before anything is made."

import functools
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from collectionlora import core
from collectionlora.bases import pipeline
from collectionlora.bases.nano import PatchPCA
from collectionlora.bases.pipeline import load_base
from collectionlora.core import UserError
from collectionlora.files.dialects import Lora
from collectionlora.files.effects import load_effect
from collectionlora.files.lora import read_lora, write_lora
from collectionlora.run import chain, cli


def call(*args):
    return CliRunner().invoke(cli.app, [str(a) for a in args])


@pytest.fixture(scope='module', autouse=True)
def named(world, folder):
    "The small world's teachers with the effect in their header, as `teach` writes them."
    (folder / 'named').mkdir()
    for id in ('one', 'two'):
        write_lora(
            folder / 'named' / f'{id}.safetensors',
            read_lora(folder / 'teachers' / f'{id}.safetensors'),
            {
                'collectionlora.base': {'hash': world[0].hash},
                'collectionlora.effects': [dict(id=id, category='animal', trigger='')],
            },
        )


def distil(folder, out, *more):
    return call(
        'distill',
        folder / 'effects',
        '-t',
        folder / 'named',
        '-g',
        folder / 'general',
        '--out',
        out,
        '--base',
        folder / 'base',
        *more,
    )


@pytest.fixture
def collection(world, folder, tmp_path):
    "A collection file of one effect for the small world's base."
    base = world[0]
    factors = {n: (torch.full((2, i), 0.01), torch.full((o, 2), 0.01)) for n, (i, o) in base.backbone.modules().items()}
    header = {
        'collectionlora.effects': [
            dict(id='three', category='animal', trigger='zorvik', prompt='zorvik, do it', description='do it')
        ],
        'collectionlora.base': {'hash': base.hash},
        'collectionlora.sampling': {'steps': 2, 'shift': 1.0, 'times': [1.0, 0.5], 'cfg': 1.0, 'stochastic': True},
    }
    write_lora(tmp_path / 'collection.safetensors', Lora(factors), header)
    return tmp_path / 'collection.safetensors'


def test_a_plan_holds_the_encoders_and_the_transformer_in_turn(world, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(chain, 'results_dir', lambda: tmp_path)
    order, leave, come = [], pipeline.Staged.drop_encoders, pipeline.load_transformer
    monkeypatch.setattr(pipeline.Staged, 'drop_encoders', lambda self: order.append('encoders leave') or leave(self))
    monkeypatch.setattr(pipeline, 'load_transformer', lambda *a, **k: order.append('transformer comes') or come(*a, **k))
    said = distil(folder, tmp_path / 'out', '--dry-run', '-p', 'steps=2', '-p', 'batch=2', '-p', 'rank=2')
    assert said.exit_code == 0 and order == ['encoders leave', 'transformer comes'], said.output
    assert 'encoders, while they encode' in said.stdout


def test_a_plan_is_printed_and_nothing_made(world, folder, tmp_path, collection, monkeypatch):
    monkeypatch.setattr(chain, 'results_dir', lambda: tmp_path)
    said = distil(
        folder,
        tmp_path / 'out',
        '--dry-run',
        '-p',
        'steps=7',
        '-p',
        'batch=2',
        '-p',
        'rank=2',
        '-p',
        'settings={fake_warmup: 3}',
    )
    assert (
        said.exit_code == 0
        and 'nothing was trained' in said.stdout
        and 'frozen base' in said.stdout
        and not (tmp_path / 'out').exists()
    ), said.output
    values, s = chain.distill_settings(
        chain.Job(tmp_path / 'out', folder / 'base', 'demo'), collection, {'settings': {}}, 'extend'
    )
    assert (
        s.few_steps == 2
        and s.rank_student == 2
        and s.steps == values['steps'] == chain.differences('extend', 'demo')['steps']
    )  # an extension's own budget, its parent's rank and few steps
    assert (
        distil(
            folder,
            tmp_path / 'out',
            '--dry-run',
            '--extend',
            collection,
            '-p',
            'steps=3',
            '-p',
            'batch=2',
            '-p',
            'settings={fake_warmup: 3}',
        ).exit_code
        == 0
    )


@pytest.mark.parametrize(
    'more, words',
    [
        (['-p', 'settings={tau_max: 750}'], 'write 0.75'),
        (['-p', 'settings={anchor_first: 5000}'], 'anchor_first'),
        (['-p', 'stesp=3'], "did you mean 'steps'"),
        (['--budget', 'more'], "'more'"),
        (['--old', 'x'], '--extend'),
    ],
)
def test_wrong_settings_are_refused_before_words_and_targets_are_made(world, folder, tmp_path, collection, more, words):
    for kind in ([], ['--extend', collection]):
        if '--old' in more and kind:
            continue
        said = distil(folder, tmp_path / 'out', *kind, *more)
        assert said.exit_code == 2 and words in said.output and not (tmp_path / 'out').exists(), said.output


def test_a_job_puts_every_stage_on_its_device_and_keeps_the_budgets_other_settings(folder, tmp_path, monkeypatch):
    asked, found = {}, {e: {'by': 'effect.yaml'} for e in ('one', 'two')}
    monkeypatch.setattr(
        chain,
        'execute',
        lambda experiment, out, run, values, inputs, seed: (
            asked.update({experiment: values}) or {'metrics': {'prompts': found}}
        ),
    )
    job = chain.Job(tmp_path, folder / 'base', 'full', device='cuda')
    given = {'settings': {'p_switch': 1.0}, 'frozen': 'int8', 'micro_batch': 3}
    chain.distill(job, chain.checked_effects([folder / 'effects']), {}, None, None, given)
    assert {e: v.get('frozen') for e, v in asked.items()} == dict.fromkeys(asked, 'int8') | {'prompts': None}
    assert asked['baseline_fm']['micro_batch'] == asked['distill']['micro_batch'] == 3
    stages = ('prompts', 'baseline_fm', 'targets', 'distill')
    assert {e: v['device'] for e, v in asked.items()} == dict.fromkeys(stages, 'cuda')
    budget = chain.differences('distill', 'full')
    assert asked['distill']['settings'] == {**budget['settings'], 'anchor_first': 0, 'p_switch': 1.0}
    assert asked['distill']['steps'] == budget['steps'] - budget['settings']['anchor_first']
    with pytest.raises(UserError, match='--general: 20% of the steps'):
        chain.distill(job, chain.checked_effects([folder / 'effects']), {})


def test_pairs_take_the_place_of_anchoring_where_nothing_else_was_asked(folder, tmp_path):
    effects = chain.checked_effects([folder / 'effects'])
    _, s = chain.distill_settings(chain.Job(tmp_path, folder / 'base', 'full'))
    started = functools.partial(chain.starts_from_pairs, s, effects)
    assert started('default') and s.anchor_first > 0
    assert not started('paper') and not started('default', tmp_path / 'own.safetensors')
    assert not started('default', None, {'settings': {'anchor_first': 100}})
    bare = {}
    for id, where in effects.items():
        bare[id] = shutil.copytree(where, tmp_path / id)
        shutil.rmtree(bare[id] / 'target')
    assert not chain.starts_from_pairs(s, bare, 'default')
    assert not chain.starts_from_pairs(replace(s, anchor_first=0, lr_anchor=None), effects, 'default')


def test_a_run_is_called_short_by_the_full_budget_as_it_began(tmp_path):
    full = chain.differences('distill', 'full')
    for anchored, steps in ((0, 80), (3, full['steps'])):
        made = {'run': {'parameters': {'settings': {'anchor_first': anchored}}}}
        core.write_json(tmp_path / 'collection.json', made)
        assert chain.full_steps(tmp_path / 'collection.json') == steps
    assert chain.full_steps(tmp_path / 'absent.json') == full['steps']


def test_a_plan_counts_the_stages_that_the_chain_asks_for(world, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(chain, 'results_dir', lambda: tmp_path)
    job, effects = chain.Job(tmp_path, folder / 'base', 'demo'), chain.checked_effects([folder / 'effects'])
    small, general = {'rank': 2, 'batch': 4}, folder / 'general'
    plan = chain.plan(job, effects, general, given=small)
    found, asked = {'metrics': {'prompts': {e: {'by': 'effect.yaml'} for e in effects}}}, {}
    monkeypatch.setattr(chain, 'execute', lambda e, out, run, values, *more: asked.update({e: values}) or found)
    chain.distill(job, effects, {}, general, given=small)
    matching, painting, loop = (asked[e] for e in ('baseline_fm', 'targets', 'distill'))
    assert plan['passes of flow matching'] == {'gradient': matching['steps'] * matching['batch']}
    lent = min(painting['borrow'], len(chain._stream(general, None)))
    pictures = sum(len(load_effect(f)) + lent for f in effects.values())
    assert painting['guidance'] == 1.0 and plan['passes of painting'] == {'forward': pictures * painting['steps']}
    assert loop['settings']['anchor_first'] == 0 and plan['generator steps'] == loop['steps'] == 80
    assert sum(plan[f'seconds of {k}'] for k in ('painting', 'flow matching')) < plan['seconds']
    anchored = chain.plan(job, effects, general, given={**small, 'settings': {'anchor_first': 3}})
    assert 'passes of flow matching' not in anchored and anchored['generator steps'] == 1280


@pytest.mark.slow
def test_a_plan_says_what_the_records_of_the_real_run_say(world, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(chain, 'results_dir', lambda: tmp_path)
    loop = {'steps': 4, 'batch': 2, 'settings': {'fake_warmup': 2, 'fake_per_generator': 2, 'p_switch': 0.5}}
    budget = {
        'distill': {**loop, 'rank': 2, 'val_every': 0, 'settings': {**loop['settings'], 'anchor_first': 2}},
        'baseline_fm': {'steps': 3, 'batch': 2},
        'targets': {'steps': 2, 'guidance': 1.0, 'borrow': 1},
        'extend': {**loop, 'looks': 1, 'rehearsed': 3},
    }
    monkeypatch.setattr(chain, 'differences', lambda experiment, name: budget.get(experiment, {}))
    effects, general = chain.checked_effects([folder / 'effects']), folder / 'general'
    counted = ('generator steps', 'fake-score updates', 'effects', 'general images', 'passes per step')
    collection, file = None, {id: folder / 'named' / f'{id}.safetensors' for id in effects}
    for id, kind in (('one', 'distill'), ('two', 'extend')):
        job, new = chain.Job(tmp_path / kind, folder / 'base', 'demo'), {id: effects[id]}
        old = [effects['one']] if collection else ()
        plan = chain.plan(job, new, general, collection, None, kind, {id: file[id]}, old)
        if kind == 'distill':
            collection = chain.distill(job, new, {id: file[id]}, general)
            matched = core.read_json(job.record('all_in_one'))['cost']
            assert plan['passes of flow matching'] == {'gradient': matched['samples']}
        else:
            chain.extend(job, collection, new, {id: file[id]}, general, [effects['one']])
            assert plan['passes of rehearsing']['forward'] > 0 and plan['old effects rehearsed'] == 1
        painted, made = (core.read_json(job.record(r)) for r in ('targets', 'collection'))
        cost, said = painted['cost'], made['metrics']['plan']
        assert plan['passes of painting'] == {'forward': cost['samples'] * cost['nfe_per_sample']}
        same = [k for k in said if k in counted or k in ('old effects rehearsed', 'generator samples per effect')]
        assert {k: plan[k] for k in same} == {k: said[k] for k in same} and set(counted) <= {*same}
        assert plan['memory'].keys() == said['memory'].keys()


def test_teachers_paint_as_many_general_pictures_as_the_budget_borrows(world, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(chain, 'results_dir', lambda: tmp_path)
    budget = chain.differences
    monkeypatch.setattr(
        chain,
        'differences',
        lambda experiment, name: (
            {'steps': 2, 'guidance': 1.0, 'borrow': 2} if experiment == 'targets' else budget(experiment, name)
        ),
    )
    job, effects = chain.Job(tmp_path / 'out', folder / 'base', 'demo'), chain.checked_effects([folder / 'effects'])
    teachers = {id: folder / 'named' / f'{id}.safetensors' for id in effects}
    own = {id: len(load_effect(p)) for id, p in effects.items()}
    painted = {id: load_effect(p) for id, p in chain.paint(job, effects, teachers, folder / 'general').items()}
    assert {id: len(e) for id, e in painted.items()} == {id: n + 2 for id, n in own.items()} and all(
        sum(s.startswith('general-') for s in e.stems) == 2 for e in painted.values()
    )
    assert {id: r['targets'] for id, r in core.read_json(job.record('targets'))['metrics'].items()} == {
        id: n + 2 for id, n in own.items()
    }
    asked = {}
    monkeypatch.setattr(
        chain, 'execute', lambda experiment, out, run, values, inputs, seed: asked.update(values=values, inputs=inputs)
    )
    chain.paint(job, effects, teachers)
    assert asked['values']['borrow'] == 0 and 'general' not in asked['inputs']


def test_the_budget_follows_the_base(folder, tmp_path):
    assert (
        cli.job_of(tmp_path, 'nano', None, 0).budget == 'full'
        and cli.job_of(tmp_path, str(folder / 'base'), None, 0).budget == 'paper'
    )
    with pytest.raises(UserError, match='gpu'):
        cli.job_of(tmp_path, 'nano', None, 0, given={'device': 'gpu'})


@pytest.mark.slow
def test_ones_own_loras_without_targets_or_general_pictures_become_a_collection(folder, tmp_path, monkeypatch):
    from collectionlora.files.header import catalogue

    monkeypatch.setattr(chain, 'results_dir', lambda: tmp_path)
    for id, name in (('one', 'my_one'), ('two', 'blueprint')):  # the second shares its name with an effect of the world
        shutil.copytree(folder / 'effects' / id / 'source', tmp_path / 'effects' / name / 'source')
        (tmp_path / 'effects' / name / 'effect.yaml').write_text(f'id: {name}\ncategory: animal\nprompt: do {id}\n')
        (tmp_path / 'loras').mkdir(exist_ok=True)
        assert (
            call(
                'convert',
                folder / 'teachers' / f'{id}.safetensors',
                tmp_path / 'loras' / f'{name}.safetensors',
                '--dialect',
                'kohya',
            ).exit_code
            == 0
        )
    said = call(
        'distill',
        tmp_path / 'effects',
        '-t',
        tmp_path / 'loras',
        '--out',
        tmp_path / 'out',
        '--base',
        folder / 'base',
        '--budget',
        'demo',
        '-p',
        'steps=2',
        '-p',
        'batch=2',
        '-p',
        'rank=2',
        '-p',
        'settings={p_switch: 1, anchor_first: 1, fake_warmup: 1}',
        '-p',
        'val_every=0',
    )
    assert said.exit_code == 0, said.output
    planned = call(
        'distill',
        tmp_path / 'effects',
        '-t',
        tmp_path / 'loras',
        '--out',
        tmp_path / 'out',
        '--base',
        folder / 'base',
        '--budget',
        'demo',
        '--dry-run',
        '-p',
        'steps=2',
        '-p',
        'batch=2',
        '-p',
        'settings={p_switch: 1, anchor_first: 1}',
    )
    assert planned.exit_code == 0 and 'nothing was trained' in planned.stdout, planned.output
    assert {e['id']: e['description'] for e in catalogue(tmp_path / 'out' / 'collection.safetensors')} == {
        'my_one': 'do one',
        'blueprint': 'do two',
    }


def test_a_start_of_larger_rank_is_refused_before_anything_loads(folder, tmp_path, collection):
    with pytest.raises(UserError, match='has rank 2, more than the 1'):
        chain.distill_settings(chain.Job(tmp_path, folder / 'base', 'demo'), collection, {'rank': 1})


def test_budgets_are_those_of_the_distillation():
    assert {'demo', 'full'} <= set(chain.budgets()) and all(
        (core.notebooks_dir() / 'distill' / f'{b}.yaml').is_file() for b in chain.budgets()
    )
    with pytest.raises(UserError, match="'more'"):
        chain.differences('distill', 'more')


def test_the_papers_budget_is_the_papers_preset(folder, tmp_path):
    from collectionlora.engine.settings import Settings

    values, s = chain.distill_settings(chain.Job(tmp_path, folder / 'base', 'paper'))
    assert values['checkpointing'] and chain.differences('teacher', 'paper')['checkpointing']
    assert (
        s == Settings.preset('paper')
        and values['steps'] == s.steps == 5000
        and (s.rank_student, s.rank_fake, s.batch) == (128, 128, 8)
    )
    teacher, fm = chain.differences('teacher', 'paper'), chain.differences('baseline_fm', 'paper')
    assert (teacher['steps'], teacher['lr'], fm['lr'], fm['steps']) == (2000, 1e-4, 1e-4, 30000)


def test_editing_says_what_is_absent_and_writes_nothing(world, folder, tmp_path, collection):
    picture = next((folder / 'general' / 'images').glob('*.png'))
    for args, words in (
        (('three', '--base', tmp_path / 'nowhere'), 'no base here'),
        (('thre', '--base', folder / 'base'), "did you mean 'three'"),
    ):
        said = call('edit', picture, *args, '--collection', collection, '--out', tmp_path / 'edits')
        assert said.exit_code == 2 and words in said.output and not (tmp_path / 'edits').exists(), said.output
    assert (
        call(
            'edit', picture, 'three', '--base', folder / 'base', '--collection', collection, '--out', tmp_path / 'edits'
        ).exit_code
        == 0
    )
    assert len(list((tmp_path / 'edits').glob('*-three-0.png'))) == 1


@pytest.mark.parametrize(
    'spoil, words',
    [
        (lambda e: (e / 'target' / '0.png').unlink(), '0.png'),
        (lambda e: (e / 'effect.yaml').write_text("id: one\ncategory: a\nprompt: ''\n"), 'prompt'),
        (
            lambda e: (e / 'effect.yaml').write_text('id: one\ncategory: a\nprompt: p\nprompts: q\n'),
            "did you mean 'prompt'",
        ),
        (lambda e: (e / 'source' / '0.png').write_bytes(b'x'), '0.png'),
    ],
)
def test_a_spoilt_effect_folder_stops_the_command_with_its_name(folder, tmp_path, world, spoil, words):
    effect = shutil.copytree(folder / 'effects' / 'one', tmp_path / 'one')
    names = sorted(p.name for p in (effect / 'source').iterdir())
    for part in ('source', 'target'):
        (effect / part / names[0]).rename(effect / part / '0.png')
    spoil(effect)
    said = call('teach', effect, '--out', tmp_path / 'out', '--base', folder / 'base')
    assert said.exit_code == 2 and words in said.output and not (tmp_path / 'out').exists(), said.output


def test_an_extension_keeps_its_parents_schedule_and_a_budget_without_a_file_is_refused(folder, tmp_path, collection):
    job = chain.Job(tmp_path, folder / 'base', 'demo')
    with pytest.raises(UserError, match='few_steps 2, the settings ask for 4'):
        chain.distill_settings(job, collection, {'settings': {'few_steps': 4}}, 'extend')
    assert chain.differences('extend', 'paper')['steps'] == 100 and chain.differences('prompts', 'paper') == {}
    with pytest.raises(UserError, match="acceleration: has no budget 'paper'.*take full"):
        chain.differences('acceleration', 'paper')


@pytest.fixture
def made(tmp_path, collection):
    "What a demonstration leaves: a collection of one effect, its teacher, and a teacher of another effect."
    (tmp_path / 'demo' / 'teachers').mkdir(parents=True)
    shutil.copyfile(collection, tmp_path / 'demo' / 'collection.safetensors')
    for id in ('three', 'four'):
        entry = {'collectionlora.effects': [dict(id=id, category='animal', trigger='')]}
        write_lora(tmp_path / 'demo' / 'teachers' / f'{id}.safetensors', read_lora(collection), entry)
    return tmp_path / 'demo'


def test_a_demonstrations_collection_ships_with_the_teachers_of_its_effects(made, tmp_path, monkeypatch):
    to = tmp_path / 'data' / 'collection'
    monkeypatch.setattr(chain, 'collection_dir', lambda: to)
    (to / 'teachers').mkdir(parents=True)
    (to / 'teachers' / 'old.safetensors').write_bytes(b'of another collection')
    assert chain.ship(made) == to
    held = {p.relative_to(to).as_posix(): p.read_bytes() for p in to.rglob('*') if p.is_file()}
    names = ('collection.safetensors', 'teachers/three.safetensors')
    assert held == {n: (made / n).read_bytes() for n in names} and [p.name for p in to.parent.iterdir()] == [
        'collection'
    ]
    shutil.rmtree(to)
    chain.ship(chain.Job(made, core.nano_dir(), 'demo'))  # the job itself is as good as its folder
    assert sorted(p.name for p in to.iterdir()) == ['collection.safetensors', 'teachers']


def test_only_a_whole_demonstration_ships_and_only_from_a_checkout(made, tmp_path, monkeypatch):
    to = tmp_path / 'data' / 'collection'
    monkeypatch.setattr(chain, 'collection_dir', lambda: to)
    to.mkdir(parents=True)
    (to / 'kept').write_text('')
    (made / 'teachers' / 'three.safetensors').unlink()
    with pytest.raises(UserError, match="effect 'three' has no teacher"):
        chain.ship(made)
    shutil.rmtree(made / 'teachers')
    with pytest.raises(UserError, match='teachers: not there, so this is no finished demonstration'):
        chain.ship(made)
    monkeypatch.setattr(chain, 'in_checkout', lambda: False)
    with pytest.raises(UserError, match='run it in a checkout'):
        chain.ship(made)
    assert [p.name for p in to.iterdir()] == ['kept']


def test_rebase_makes_the_acceleration_lora_the_demonstration_and_what_ships(tmp_path, monkeypatch):
    order = []

    def done(experiment, out, run, *more):
        order.append(experiment)
        (out / f'{run}.safetensors').parent.mkdir(parents=True, exist_ok=True)
        (out / f'{run}.safetensors').write_text(experiment)

    monkeypatch.setattr(chain, 'execute', done)
    monkeypatch.setattr(chain, 'data_dir', lambda: tmp_path / 'data')
    monkeypatch.setattr(chain, 'results_dir', lambda: tmp_path / 'results')
    monkeypatch.setattr(
        chain, 'demo', lambda seed, processes: order.append('demo') or tmp_path / 'results' / 'demo' / 'report.html'
    )
    monkeypatch.setattr(chain, 'ship', lambda folder: order.append(folder))
    assert chain.rebase() == tmp_path / 'results' / 'demo' / 'report.html'
    assert order == ['effects', 'acceleration', 'demo', tmp_path / 'results' / 'demo']
    assert (tmp_path / 'data' / 'acceleration' / 'acceleration.safetensors').read_text() == 'acceleration'


def test_a_trained_base_becomes_the_nano_base_in_half_the_size(tmp_path, monkeypatch):
    trained, nano = tmp_path / 'trained', tmp_path / 'data' / 'nano'
    shutil.copytree(core.nano_dir(), trained)
    shutil.copytree(core.nano_dir(), nano)
    vae = load_base(trained).pipe.vae
    deeper = PatchPCA.from_config(vae.config, refine=8)
    deeper.load_state_dict({k: v for k, v in vae.state_dict().items() if k in ('W', 'mu')}, strict=False)
    deeper.save_pretrained(trained / 'vae')
    weights = trained / 'transformer' / 'diffusion_pytorch_model.safetensors'
    save_file({k: v.float() for k, v in load_file(weights).items()}, weights, metadata={'format': 'pt'})
    monkeypatch.setattr(chain, 'nano_dir', lambda: nano)
    chain.install_base(trained)
    name = Path('transformer') / 'diffusion_pytorch_model.safetensors'
    before, after = load_file(trained / name), load_file(nano / name)
    assert all(torch.equal(after[k], v.to(torch.bfloat16)) for k, v in before.items())
    assert core.read_json(nano / 'training.json') == core.read_json(trained / 'training.json')
    again = load_base(nano)
    assert again.pipe.vae.config.refine == 8 and again.pipe.vae.W.dtype == torch.float32
    assert again.backbone.dtype == torch.float32 and again.hash != load_base(trained).hash
    assert not list(nano.parent.glob('.*'))
    monkeypatch.setattr(chain, 'in_checkout', lambda: False)
    with pytest.raises(UserError, match='run it in a checkout'):
        chain.install_base(trained)


def test_a_job_overwrites_finished_runs_only_when_told(folder, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(chain, 'execute', lambda *args, **more: asked.append(more))
    for replace in (False, True):
        chain.Job(tmp_path, folder / 'base', 'demo', replace=replace).do('effects', 'effects', {})
    assert asked == [{}, {'replace': True}]


def test_pictures_effects_and_seeds_are_edited_in_all_combinations(world, folder, tmp_path, collection):
    (tmp_path / 'mine').mkdir()
    pictures = sorted((folder / 'general' / 'images').glob('*.png'))[:3]
    for name, picture in zip('abc', pictures):
        shutil.copyfile(picture, tmp_path / ('mine' if name < 'c' else '.') / f'{name}.png')
    where = ['--base', folder / 'base', '--collection', collection, '--out', tmp_path / 'edits']
    more = [
        '--picture',
        tmp_path / 'c.png',
        '--seed',
        3,
        '--seeds',
        2,
        '--strength',
        0.5,
        '--sheet',
        tmp_path / 's.jpg',
    ]
    said = call('edit', tmp_path / 'mine', *where, *more)
    assert said.exit_code == 0, said.output
    names = [f'{p}-three-{s}-strength0.5.png' for p in 'abc' for s in (3, 4)]
    assert sorted(p.name for p in (tmp_path / 'edits').iterdir()) == names
    assert [line.split('/')[-1] for line in said.stdout.splitlines()] == [*names, 's.jpg']
    assert 'are edited at' in said.stderr
    with Image.open(tmp_path / 's.jpg') as sheet, Image.open(tmp_path / 'edits' / names[0]) as first:
        assert sheet.format == 'JPEG' and sheet.height > 2 * sheet.width and first.size == Image.open(pictures[0]).size


def test_editing_asks_for_what_is_missing(world, folder, tmp_path, collection):
    picture = next((folder / 'general' / 'images').glob('*.png'))
    (tmp_path / 'empty').mkdir()
    for args, words in (
        ((), 'no picture was given'),
        ((picture, '--base', folder / 'base'), '--collection: name one that was made for this base'),
        ((tmp_path / 'empty', '--collection', collection), 'no picture'),
        ((picture, '--collection', collection, '--base', folder / 'base', '--size', 'large'), "'large'"),
    ):
        said = call('edit', *args, '--out', tmp_path / 'edits')
        assert said.exit_code == 2 and words in said.output and not (tmp_path / 'edits').exists(), said.output
    listed = call('edit', '--list', '--collection', collection)
    assert listed.exit_code == 0 and 'zorvik' in listed.stdout


def test_nothing_that_a_run_reads_lies_where_it_writes(folder, tmp_path):
    job, effects = chain.Job(tmp_path, folder / 'base', 'demo'), chain.checked_effects([folder / 'effects'])
    id = next(iter(effects))
    mine = {id: shutil.copytree(effects[id], tmp_path / 'described' / id)}
    with pytest.raises(UserError, match='which is written here'):
        chain.describe(job, mine)
    assert load_effect(mine[id]).stems == load_effect(effects[id]).stems
    parent = tmp_path / 'collection.safetensors'
    for start in (lambda: chain.distill(job, effects, {}, init=parent), lambda: chain.extend(job, parent, effects, {})):
        with pytest.raises(UserError, match='would take its place'):
            start()
