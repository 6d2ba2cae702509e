"Many processes: the same numbers as one, sharded moments and bases, deaths, interrupts, and the runner on top of it all."

import errno
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from collectionlora import core
from collectionlora.bases.pipeline import load_base
from collectionlora.core import UserError
from collectionlora.engine import parallel, terms
from collectionlora.engine.finetune import FlowSettings, train_teacher
from collectionlora.engine.loop import distill
from collectionlora.engine.parallel import Ranks, together
from collectionlora.engine.pools import load_pools, samples_of
from collectionlora.engine.settings import resolved, schedule_of
from collectionlora.engine.state import State
from collectionlora.engine.targets import paint_targets
from collectionlora.engine.terms import Engine
from collectionlora.files.conditions import ConditionCache
from collectionlora.files.header import read_header
from collectionlora.files.lora import read_lora, write_lora
from collectionlora.run import slurm as arrays
from collectionlora.run.execute import execute, RunFailed
from collectionlora.run.keys import notebook_code
from collectionlora.run.signature import notebook_path
from collectionlora.run.sweep import sweep, table, write_table
from collectionlora.run.torchrun import shares_work

from test_distill import fake_samples, make_world, open_world, SMALL

TINY = replace(SMALL, steps=3, batch=5, fake_warmup=2, routes=3)
MOVING = ('seconds', 'lr', 'step', 'effect', 'warmup')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp('world')


@pytest.fixture(scope='module')
def world(folder):
    args = open_world(folder, make_world(folder))
    load_pools(args[4], samples_of(*args[2:4]))  # fills the cache once, before anything is forked
    yield args
    args[1].close()


def train(world, s, out, **kw):
    return lambda ranks: list(distill(*world, s, out, ranks=ranks, **kw))


def answers(found):
    assert [e for _, e in found] == [None] * len(found)
    return [a for a, _ in found]


def weights(out):
    return torch.cat([x.flatten() for pair in read_lora(out / 'collection.safetensors').factors.values() for x in pair])


def agree(a, b, tol=1e-3):
    "Two histories are the same to rounding, losses, norms and monitors alike."
    assert [(h['step'], h['effect']) for h in a] == [(h['step'], h['effect']) for h in b] and len(a) == len(b)
    for x, y in zip(a, b):
        assert x.keys() == y.keys()
        for k in x.keys() - set(MOVING):
            if isinstance(x[k], (int, float)):
                assert x[k] == pytest.approx(y[k], rel=tol, abs=tol), (x['step'], k)
    return True


def single(f):
    "f on one process, in a fork of its own: the bank's reading thread does not survive a fork, so this process must not start it."
    return answers(together(f, 1))[0]


@pytest.fixture(scope='module')
def alone(world, tmp_path_factory):
    "The run on one process: history and weights."
    out = tmp_path_factory.mktemp('alone')
    return single(train(world, TINY, out)), weights(out)


# --- the other stages: encoding, painting, a teacher, judging
def test_jobs_are_dealt_evenly_and_everybody_gets_all_answers():
    def go(ranks):
        def three(n):
            if n == 99:
                raise UserError(f'{n} is too many')
            return 3 * n, ranks.rank

        found = ranks.map(three, [5, 1, 1, 1, 2], int)
        try:
            return found, ranks.map(three, [1, 99], int)
        except UserError as e:
            return found, str(e)

    (a, wrong), (b, also) = answers(together(go))
    assert a == b and [x for x, _ in a] == [15, 3, 3, 3, 6] and wrong == also == '99 is too many'
    assert [rank for _, rank in a] == [0, 1, 1, 1, 1]  # 5 against 5


def files_in(folder) -> dict:
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob('*')) if p.is_file()}


def test_encoding_and_painting_are_the_same_bits_on_two_processes(world, tmp_path):
    base, bank, effects, general, _ = world

    def make(out):
        def go(ranks):
            cache = ConditionCache(base, out / 'cache', batch=2)
            seen = [(p, c) for e in effects for p in e.sources for c in (e.prompt, ' ')] + list(general)
            here = cache.warm(seen, images=effects[0].targets, ranks=ranks)
            done = paint_targets(base, bank, effects, cache, out / 'targets', steps=2, w=2.0, batch=2, ranks=ranks)
            return here, [e.hash for e in done]

        return go

    (alone,) = answers(together(make(tmp_path / 'one'), 1))
    both = answers(together(make(tmp_path / 'two')))
    assert min(n for n, _ in both) > 0 and sum(n for n, _ in both) == alone[0] and both[0][1] == both[1][1] == alone[1]
    assert files_in(tmp_path / 'two') == files_in(tmp_path / 'one')


def test_a_teacher_on_two_processes_has_the_losses_of_one(world, tmp_path):
    base, _, effects, _, cache = world
    s = FlowSettings(steps=4, batch=5, rank=2, lr=1e-3, seed=3, save_every=2)

    def go(ranks, steps=4, name='a'):
        training, infos = train_teacher(base, effects[0], cache, s, tmp_path / f'{name}.pt', ranks=ranks), []
        for info in training:
            infos.append(info)
            if len(infos) == steps:
                break
        training.close()
        return [(i['loss'], i['grad_norm']) for i in infos]

    alone, both = answers(together(go, 1))[0], answers(together(lambda r: go(r, name='b')))
    assert both[0] == both[1] and all(a == pytest.approx(b, rel=1e-4) for a, b in zip(both[0], alone))
    answers(together(lambda r: go(r, 2, 'c')))  # stopped on two, resumed on one
    resumed = answers(together(lambda r: go(r, name='c'), 1))[0]
    assert all(a == pytest.approx(b, rel=1e-4) for a, b in zip(resumed, alone))


TRAINING = ('teacher', 'baseline_fm', 'targets', 'distill', 'extend', 'acceleration')


def test_every_stage_that_trains_or_paints_shares_its_work_and_never_holds_encoders_and_transformer_at_once():
    for name in TRAINING:
        path = notebook_path(name)
        code = notebook_code(path)
        loads = [line for line in code.splitlines() if ' = load_base(' in line]
        assert shares_work(path) and len(loads) == 1 and 'staged=' in loads[0] and 'frozen=frozen' in loads[0], name
        assert '.load_transformer()' in code and 'ranks.leave()' in code, name
    assert 'staged=True' in notebook_code(notebook_path('prompts'))  # which needs no transformer at all


def test_a_checkpoint_is_removed_only_after_the_record_is_written():
    for name in TRAINING:
        code, removals = notebook_code(notebook_path(name)), ('checkpoint.unlink', "'checkpoints', ignore_errors")
        ends = [code.rindex(r) for r in removals if r in code]
        assert all(code.rindex('core.save_run(') < end for end in ends) and (ends or name == 'targets'), name


# --- the same numbers
def test_two_processes_give_the_losses_of_one_with_both_streams_in_a_step(world, alone, tmp_path):
    first, second = answers(together(train(world, TINY, tmp_path)))
    assert agree(first, alone[0]) and agree(second, alone[0])
    assert any(None in h['effect'] and any(h['effect']) for h in first)
    assert torch.allclose(weights(tmp_path), alone[1], atol=1e-3)
    assert len(list(tmp_path.rglob('*.safetensors'))) == 1 and not list(tmp_path.rglob('*.part'))


@pytest.mark.parametrize(
    'change',
    [
        dict(routes=1),
        dict(shared_rollout=True),
        dict(routes=1, fake_batch='same', one_exit=True),
        dict(low_precision=True, routes=5),
    ],
)
def test_so_it_is_with_other_settings(world, tmp_path, change):
    s = replace(TINY, steps=2, **change)
    one = single(train(world, s, tmp_path / 'one'))
    for found in answers(together(train(world, s, tmp_path / 'two'))):
        agree(found, one, 3e-2 if s.low_precision else 1e-3)


def test_draws_of_a_sample_do_not_depend_on_who_holds_it(world):
    base, bank, effects, general, cache = world
    pools, s = load_pools(cache, samples_of(effects, general)), resolved(TINY, 1.0)
    starts = []
    for rank, n in ((0, 1), (0, 2), (1, 2)):
        engine = Engine(base.backbone, bank, pools, s, schedule_of(s), Ranks(rank, n))
        engine.backbone.add_role('student', 2)
        try:
            starts.append(fake_samples(engine, None, 4)[0])
        finally:
            engine.backbone.remove('student')
    assert [len(x) for x in starts] == [5, 3, 2]
    for part, mine in ((starts[1], slice(0, None, 2)), (starts[2], slice(1, None, 2))):
        assert torch.allclose(part, starts[0][mine], atol=1e-4)


# --- moments in slices
def test_sliced_moments_change_no_bit(world, tmp_path):
    for name, slices in (('whole', False), ('sliced', True)):
        answers(together(train(world, TINY, tmp_path / name, save_every=1), slices=slices))
    assert torch.equal(weights(tmp_path / 'whole'), weights(tmp_path / 'sliced'))
    a, b = (
        torch.load(next((tmp_path / n / 'checkpoints').glob('0000003*')), weights_only=True)
        for n in ('whole', 'sliced')
    )
    assert (
        torch.equal(a['opt_fake']['state'][0]['exp_avg_sq'], b['opt_fake']['state'][0]['exp_avg_sq'])
        and a['opt_student'].keys() == b['opt_student'].keys()
    )


# --- stop and resume
def stop_after(world, s, out, step, **kw):
    def go(ranks):
        training = distill(*world, s, out, ranks=ranks, **kw)
        for info in training:
            if info['step'] == step:
                break
        training.close()

    return go


def test_stopped_on_two_resumed_on_two_one_and_in_slices(world, alone, tmp_path):
    straight = answers(together(train(world, TINY, tmp_path / 'straight')))[0]
    for name, again in (
        ('two', together),
        ('slices', lambda f: together(f, slices=True)),
        ('one', lambda f: together(f, 1)),
    ):
        answers(together(stop_after(world, TINY, tmp_path / name, 1)))
        assert [p.name[:7] for p in (tmp_path / name / 'checkpoints').glob('*.pt')] == ['0000001']
        history = answers(again(train(world, TINY, tmp_path / name)))[0]
        agree(history, straight)
        if name != 'one':
            assert torch.equal(weights(tmp_path / name), weights(tmp_path / 'straight'))


def test_an_interrupt_of_one_process_stops_both_at_the_same_step(world, tmp_path):
    def go(ranks):
        try:
            for info in distill(*world, replace(TINY, steps=50), tmp_path, ranks=ranks, save_every=100):
                if ranks.rank == 1 and info['step'] == 2:
                    os.kill(os.getpid(), signal.SIGUSR1)
        except KeyboardInterrupt:
            return info['step']

    true = terms.fake_loss

    def asked(*args):
        if asked.now:
            os.kill(os.getpid(), signal.SIGINT)
        asked.now = False
        return true(*args)

    asked.now = False
    before = signal.signal(signal.SIGUSR1, lambda *_: setattr(asked, 'now', True))
    terms.fake_loss = asked
    try:
        assert answers(together(go)) == [2, 2]
    finally:
        terms.fake_loss = true
        signal.signal(signal.SIGUSR1, before)
    assert [p.name for p in (tmp_path / 'checkpoints').glob('*.pt')] == ['0000002-00000007.pt']


# --- faults
def test_errors_are_shared_and_settings_that_do_not_scale_are_refused(world, tmp_path, monkeypatch):
    def said(s, out, **kw):
        return {e for _, e in together(train(world, s, out, **kw))}

    few = said(replace(TINY, batch=1, routes=1), tmp_path / 'few')
    assert len(few) == 1 and 'fewer samples than the 2 processes' in few.pop()

    def full(*_):
        raise OSError(errno.ENOSPC, 'No space left on device')

    monkeypatch.setattr(State, 'pack', full)
    disk = said(TINY, tmp_path / 'full', save_every=1)
    monkeypatch.undo()
    assert len(disk) == 1 and 'make room' in disk.pop()
    with core.folder_lock(tmp_path / 'held'):
        assert all('another run' in e for e in said(TINY, tmp_path / 'held'))


SCRIPT = """
import os, sys
sys.path.insert(0, {tests!r})
from dataclasses import replace
from pathlib import Path
from test_parallel import TINY
from test_distill import open_world
from collectionlora.core import UserError
from collectionlora.engine.loop import distill
try:
    for info in distill(*open_world(Path({folder!r})), replace(TINY, steps=6), {out!r}, save_every=1):
        print(os.environ.get('RANK', 0), os.getpid(), info['step'], flush=True)
except UserError as e: sys.exit(f'stopped: {{e}}')
os._exit(0)
"""


def launch(folder, out, processes):
    code = textwrap.dedent(SCRIPT).format(
        tests=os.path.dirname(os.path.abspath(__file__)), folder=str(folder), out=str(out)
    )
    launcher = (
        [sys.executable, '-m', 'torch.distributed.run', '--standalone', f'--nproc-per-node={processes}', '--no-python']
        if processes > 1
        else []
    )
    return subprocess.Popen(
        [*launcher, sys.executable, '-c', code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.slow
def test_kill_nine_of_one_process_stops_the_others_and_resumes_to_the_same_bits(folder, world, tmp_path):
    answers(together(train(world, replace(TINY, steps=6), tmp_path / 'whole', save_every=1)))
    job = launch(folder, tmp_path / 'killed', 2)
    for line in job.stdout:
        rank, pid, step = line.split()
        if rank == '1' and step == '2':
            os.kill(int(pid), signal.SIGKILL)
            break
    started = time.time()
    said = job.communicate(timeout=120)[1]
    assert job.returncode != 0 and time.time() - started < 60 and 'SIGKILL' in said
    assert not (tmp_path / 'killed' / 'collection.safetensors').exists()
    answers(together(train(world, replace(TINY, steps=6), tmp_path / 'killed', save_every=1)))
    assert torch.equal(weights(tmp_path / 'killed'), weights(tmp_path / 'whole'))


def test_who_is_left_behind_says_so(world, tmp_path):
    def go(ranks):
        for info in distill(*world, replace(TINY, steps=50), tmp_path, ranks=ranks):
            if ranks.rank and info['step'] == 2:
                os.kill(os.getpid(), signal.SIGKILL)

    left, dead = [e for _, e in together(go)]
    assert (
        left.startswith('PeerGone: process 0 of 2: another process')
        and 'last checkpoint' in left
        and dead == 'died (-9)'
    )


def test_a_killed_kernel_of_one_process_is_said_as_of_a_single_one(tmp_path):
    from papermill.exceptions import PapermillExecutionError

    from collectionlora.run import execute as runner

    dead = PapermillExecutionError(0, 0, '', 'DeadKernelError', 'Kernel died', '')
    said = str(runner._failed(Path('distill.ipynb'), tmp_path, 'collection', {}, dead))
    assert 'killed, or out of memory; the same command goes on from the last checkpoint' in said
    assert core.read_json(tmp_path / 'collection.json')['status'] == 'failed'


# --- a base that does not fit
def probe(base, world, s, ranks):
    "Velocities and gradients of a step's terms on this base, with roles that are not zero."
    _, bank, effects, general, cache = world
    b = base.backbone
    for k, role in enumerate(('student', 'fake', 'teacher')):
        b.add_role(role, 2, seed=k)
        with torch.no_grad():
            b.flat(role).normal_(0, 0.1, generator=torch.Generator().manual_seed(10 + k))
    pools = load_pools(cache, samples_of(effects, general))
    cond, g = pools[0].student.index([0, 1]), torch.Generator().manual_seed(0)
    x, t = torch.randn(2, 64, 16, generator=g), torch.tensor([0.3, 0.8])
    with torch.no_grad():
        v = {str(r): b.velocity(r, x, t, cond) for r in ('base', 'student', ('fake', 'teacher'))}
    engine = Engine(b, type('Slot', (), {'use': lambda self, id: 'teacher'})(), pools, s, schedule_of(s), ranks)
    return (
        v,
        {k: g for k, (g, _, _) in terms.gradients(engine, ['one'], 0).items()},
        b.flat('student').shape,
        parallel.bytes_here(b.transformer),
    )


@pytest.mark.parametrize('checkpointing', [False, True])
def test_a_spread_base_computes_the_same(folder, world, checkpointing):
    s = resolved(replace(SMALL, batch=4, routes=1, one_exit=True), 1.0)

    def spread(ranks):
        base = parallel.shard_base(load_base(folder / 'base'), ranks)
        base.backbone.checkpointing(checkpointing)
        return probe(base, world, s, ranks)

    v, grads, shape, whole_bytes = probe(load_base(folder / 'base'), world, s, Ranks())
    for theirs in answers(together(spread)):
        for role in v:
            assert torch.allclose(theirs[0][role], v[role], atol=1e-5), role
        assert theirs[1].keys() == grads.keys() == {'bs', 'ts', 'fm'}
        for k in grads:
            assert (
                torch.allclose(theirs[1][k], grads[k], rtol=1e-2, atol=1e-3 * grads[k].abs().max())
                and grads[k].abs().max() > 0
            )
        assert theirs[2] == shape and theirs[3] < 0.75 * whole_bytes


def test_a_whole_run_on_a_spread_base(folder, world, tmp_path):
    s = replace(TINY, steps=2, routes=1, one_exit=True)
    one = single(train(world, s, tmp_path / 'one', val_every=2))

    def spread(settings, out):
        def go(ranks):
            base = parallel.shard_base(load_base(folder / 'base'), ranks)
            return list(distill(*open_world(folder, base), settings, out, ranks=ranks, val_every=2))

        return go

    for found in answers(together(spread(s, tmp_path / 'two'))):
        agree(found, one)
    assert torch.allclose(weights(tmp_path / 'one'), weights(tmp_path / 'two'), atol=1e-3)
    refused = {e for _, e in together(spread(replace(s, one_exit=False), tmp_path / 'no'))}
    assert len(refused) == 1 and 'one_exit is False' in refused.pop()


def test_who_is_left_behind_on_a_spread_base_says_so_too(folder, tmp_path):
    def go(ranks):
        base = parallel.shard_base(load_base(folder / 'base'), ranks)
        for info in distill(
            *open_world(folder, base), replace(TINY, steps=50, routes=1, one_exit=True), tmp_path, ranks=ranks
        ):
            if ranks.rank and info['step'] == 2:
                os.kill(os.getpid(), signal.SIGKILL)

    left, dead = [e for _, e in together(go)]
    assert left.startswith('PeerGone: process 0 of 2: another process') and dead == 'died (-9)'


# --- the runner: papermill under torchrun
HEAD = "out: str = ''\nrun: str = 'run'\nseed: int = 0\nmode: str = 'sum'"
BODY = """import os, signal, time
from pathlib import Path
from collectionlora import core
from collectionlora.core import UserError
from collectionlora.engine import parallel
ranks = parallel.join()
print('here is', ranks.rank)
if mode == 'bad' and ranks.rank == 1: raise UserError('effect.yaml: prompt is empty')
if mode == 'dead' and ranks.rank == 1: os.kill(os.getpid(), signal.SIGKILL)
try:
    if mode == 'long':
        Path(out, f'started{ranks.rank}').write_text('')
        for _ in range(600): time.sleep(.1)
    total = ranks.total(ranks.rank + 1.)
except KeyboardInterrupt:
    time.sleep(1 - ranks.rank)                       # who saves is not stopped by who has nothing to save
    Path(out, f'saved{ranks.rank}').write_text('')
    raise
core.save_run(ranks.own(out, run)/f'{run}.json', core.run_info(dict(mode=mode), seed, {}), dict(total=total), {})
ranks.leave()"""


def notebook(path, body=BODY):
    import nbformat

    cells = [nbformat.v4.new_code_cell(HEAD, metadata={'tags': ['parameters']}), nbformat.v4.new_code_cell(body)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path


def test_a_notebook_runs_on_two_processes_each_with_its_own_output(tmp_path):
    path, out = notebook(tmp_path / 'a.ipynb'), tmp_path / 'results'
    record = execute(path, out, processes=2)
    assert record['metrics'] == {'total': 3.0} and record['meta']['processes'] == 2 and record['status'] == 'finished'
    assert {p.name for p in out.iterdir() if not p.name.startswith('.')} == {'run.json', 'run.ipynb'}
    assert (
        'here is 0' in (out / 'run.ipynb').read_text()
        and 'here is 1' in (out / '.run.ranks' / '1' / 'run.ipynb').read_text()
    )
    assert (out / '.run.ranks' / '1' / 'log.txt').is_file()
    assert execute(path, out)['reused']  # how many processes there were is no part of the key
    single = notebook(tmp_path / 'b.ipynb', 'total = 1')
    with pytest.raises(UserError, match='made for one process'):
        execute(single, tmp_path / 'no', processes=2)
    with pytest.raises(UserError, match='processes is 0'):
        execute(path, tmp_path / 'no', processes=0)


@pytest.mark.slow
def test_the_first_error_is_reported_and_a_death_too(tmp_path):
    path = notebook(tmp_path / 'a.ipynb')
    with pytest.raises(UserError, match='prompt is empty'):
        execute(path, tmp_path / 'bad', parameters={'mode': 'bad'}, processes=2)
    with pytest.raises(RunFailed, match='kernel died'):
        execute(path, tmp_path / 'dead', parameters={'mode': 'dead'}, processes=2)
    assert core.read_json(tmp_path / 'dead' / 'run.json')['status'] == 'failed'


def test_ctrl_c_lets_every_process_save(tmp_path):
    path, out = notebook(tmp_path / 'a.ipynb'), tmp_path / 'results'
    start = "import sys; from collectionlora.run.execute import execute; execute(sys.argv[1], sys.argv[2], parameters={'mode': 'long'}, processes=2)"
    job = subprocess.Popen(
        [sys.executable, '-c', start, path, out], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    for _ in range(1200):
        if all((out / f'started{r}').exists() for r in (0, 1)) or job.poll() is not None:
            break
        time.sleep(0.1)
    job.send_signal(signal.SIGINT)
    said = job.communicate(timeout=120)[1]
    assert 'goes on from the last checkpoint' in said and all((out / f'saved{r}').exists() for r in (0, 1))
    assert core.read_json(out / 'run.json')['status'] == 'interrupted'


def files_of(folder) -> dict:
    "The world's files as parameters of the distill notebook, which knows teachers by their catalogue."
    effects = sorted((folder / 'effects').iterdir())
    for e in effects:
        file = folder / 'teachers' / f'{e.name}.safetensors'
        if 'collectionlora.effects' not in read_header(file):
            write_lora(
                folder / 'named' / file.name,
                read_lora(file),
                {
                    **read_header(file),
                    'collectionlora.effects': [
                        {'id': e.name, 'category': 'animal', 'prompt': f'apply {e.name}', 'trigger': e.name}
                    ],
                },
            )
    return dict(
        base=str(folder / 'base'),
        effects=[str(e) for e in effects],
        teachers=[str(folder / 'named')],
        general=str(folder / 'general'),
        cache=str(folder / 'cache'),
        pictures=0,
    )


def distilled(folder, out, name, processes, **given):
    parameters = (
        files_of(folder)
        | dict(steps=2, batch=4, rank=3, val_every=2, settings={'fake_per_generator': 2, 'fake_warmup': 2, 'routes': 2})
        | given
    )
    return execute('distill', out, name, parameters, seed=1, processes=processes)


@pytest.mark.slow
def test_the_distill_notebook_on_two_processes(folder, world, tmp_path):
    one = distilled(folder, tmp_path, 'one', 1)['metrics']
    two = distilled(folder, tmp_path, 'two', 2)['metrics']
    assert agree(
        [{k: v for k, v in h.items() if v is not None} for h in two['history']],
        [{k: v for k, v in h.items() if v is not None} for h in one['history']],
    )
    assert (tmp_path / '.two.ranks' / '1' / 'two.ipynb').is_file() and not list(tmp_path.glob('[!.]*rank*'))
    spread = distilled(
        folder,
        tmp_path,
        'spread',
        2,
        spread_base=True,
        spread_moments=True,
        settings={'fake_per_generator': 2, 'fake_warmup': 2, 'one_exit': True},
    )
    assert spread['status'] == 'finished' and spread['metrics']['history'][0]['loss_fake'] > 0


# --- batches of runs
SLEEP = "from pathlib import Path\nfrom collectionlora import core\nassert mode != 'fail', 'asked to'\ncore.save_run(Path(out, f'{run}.json'), core.run_info(dict(mode=mode), seed, {}), dict(tens=10*seed), {})"


def four(path, out, **slurm):
    grid = {'seed': [1, 2], 'mode': ['x', 'y']}
    return sweep(path, grid, out, slurm={'timeout_min': 10, 'cpus_per_task': 1, **slurm})


@pytest.mark.slow
def test_a_sweep_as_an_array_of_local_jobs(tmp_path):
    pytest.importorskip('submitit')
    path = notebook(tmp_path / 'a.ipynb', SLEEP)
    with pytest.raises(UserError, match='timeout_mi'):
        four(path, tmp_path / 'no', cluster='local', timeout_mi=3)
    records = four(path, tmp_path / 's', cluster='local')
    assert [r['metrics']['tens'] for r in records.values()] == [10, 10, 20, 20]
    with pytest.raises(RunFailed, match='1 of 2 runs failed.*asked to'):
        sweep(path, {'mode': ['x', 'fail'], 'seed': [1]}, tmp_path / 'f', slurm={'cluster': 'local'})
    assert (
        'mode=fail,failed' in (tmp_path / 'f' / 'table.csv').read_text()
        and 'mode=x,finished' in (tmp_path / 'f' / 'table.csv').read_text()
    )


# --- a real Slurm on one node
CONF = """ClusterName=lesson
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
ReturnToService=2
StateSaveLocation={d}/state
SlurmdSpoolDir={d}/spool
SlurmctldPidFile={d}/slurmctld.pid
SlurmdPidFile={d}/slurmd.pid
SlurmctldLogFile={d}/slurmctld.log
SlurmdLogFile={d}/slurmd.log
SlurmctldPort=16817
SlurmdPort=16818
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory=2000 State=UNKNOWN
PartitionName=all Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def install_slurm():
    "Slurm from the distribution's packages, if this is root's machine to do so."
    import shutil

    if shutil.which('slurmctld') and shutil.which('slurmd') and shutil.which('munged'):
        return
    if os.geteuid() != 0 or not shutil.which('apt-get'):
        pytest.skip('no Slurm here, and installing one needs root and apt-get')
    env = {**os.environ, 'DEBIAN_FRONTEND': 'noninteractive', 'RUNLEVEL': '1'}
    for command in (
        ['update', '-qq'],
        ['install', '-qq', '--no-install-recommends', 'slurmctld', 'slurmd', 'slurm-client', 'munge'],
    ):
        done = subprocess.run(['apt-get', *command], capture_output=True, text=True, env=env, timeout=600)
    if done.returncode:
        pytest.skip(f'no Slurm here, and apt-get cannot install it: {done.stderr.strip().splitlines()[-1:]}')


def started_munge():
    "munged for the lesson: the one that runs, else a new one (which is returned, to be stopped)."
    if subprocess.run('munge -n | unmunge', shell=True, capture_output=True).returncode == 0:
        return None
    Path('/run/munge').mkdir(exist_ok=True)
    subprocess.run(['chown', 'munge:', '/run/munge'], check=True)
    daemon = subprocess.Popen(
        ['su', '-s', '/bin/sh', 'munge', '-c', 'exec munged --foreground --force'],
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    wait_for(lambda: subprocess.run('munge -n | unmunge', shell=True, capture_output=True).returncode == 0, 'munged')
    return daemon


def wait_for(ready, what, seconds=60):
    for _ in range(10 * seconds):
        if ready():
            return
        time.sleep(0.1)
    pytest.skip(f'{what} does not come up on this machine')


def node_is_idle():
    return 'idle' in subprocess.run(['sinfo', '--noheader', '--format=%T'], capture_output=True, text=True).stdout


@pytest.fixture(scope='module')
def slurm(tmp_path_factory):
    "A Slurm of one node, started for this module and stopped after it."
    import socket

    install_slurm()
    if os.geteuid() != 0:
        pytest.skip("a Slurm of one's own needs root to run its daemons")
    d, host = tmp_path_factory.mktemp('slurm'), socket.gethostname().split('.')[0]
    (d / 'slurm.conf').write_text(CONF.format(host=host, d=d, cpus=max(2, os.cpu_count() or 2)))
    for name in ('state', 'spool'):
        (d / name).mkdir()
    os.environ['SLURM_CONF'] = str(d / 'slurm.conf')
    daemons = [started_munge()]
    for command in (['slurmctld', '-D', '-c'], ['slurmd', '-D', '-N', host]):
        daemons.append(
            subprocess.Popen(
                [*command, '-f', str(d / 'slurm.conf')], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
        )
    try:
        wait_for(node_is_idle, 'slurmd')
        yield d
        subprocess.run(['scancel', '--user=root'], capture_output=True)
        wait_for(
            lambda: not subprocess.run(['squeue', '--noheader'], capture_output=True, text=True).stdout.strip(),
            'the end of all jobs',
        )
    finally:
        for daemon in filter(None, reversed(daemons)):
            stop(daemon)
        del os.environ['SLURM_CONF']


def stop(daemon):
    daemon.terminate()
    try:
        daemon.wait(20)
    except subprocess.TimeoutExpired:
        daemon.kill()


@pytest.mark.slow
def test_a_slurm_array_of_four_runs_in_one_table(slurm, folder, world, tmp_path):
    given = {k: [v] for k, v in files_of(folder).items()} | dict(
        steps=[1], batch=[2], rank=[2], val_every=[0], settings=[{'fake_per_generator': 1, 'fake_warmup': 1}]
    )
    go = lambda: sweep(
        'distill', {**given, 'seed': [0, 1, 2, 3]}, tmp_path / 's', slurm={'timeout_min': 30, 'cpus_per_task': 1}
    )
    records = go()
    assert (
        list(records) == ['seed=0', 'seed=1', 'seed=2', 'seed=3']
        and len({r['metrics']['lora'] for r in records.values()}) == 4
    )
    rows = (tmp_path / 's' / 'table.csv').read_text().splitlines()
    assert len(rows) == 5 and rows[0].startswith('run,status,seed,') and all(',finished,' in row for row in rows[1:])
    ids = core.read_json(tmp_path / 's' / '.slurm' / 'jobs.json')
    assert len({i.split('_')[0] for i in ids.values()}) == 1  # one array
    assert (
        go() == records and core.read_json(tmp_path / 's' / '.slurm' / 'jobs.json') == ids
    )  # nothing is submitted twice
    if 'COLLECTIONLORA_SLURM_RECORD' in os.environ:
        leave_record(Path(os.environ['COLLECTIONLORA_SLURM_RECORD']), tmp_path / 's', records, ids)


def leave_record(to, out, records, ids):
    "The array's table and a record of it, into folder `to`; reached only when all that was asserted holds."
    said = lambda *c: subprocess.run(c, capture_output=True, text=True).stdout
    seen = {
        name: dict(
            re.findall(r'(JobState|BatchHost|StartTime|EndTime|ExitCode)=(\S+)', said('scontrol', 'show', 'job', i))
        )
        for name, i in ids.items()
    }
    seen = {
        name: {**job, 'BatchHost': 'the one node' if job.get('BatchHost') else ''} for name, job in seen.items()
    }  # records name no machine
    assert all(job['JobState'] == 'COMPLETED' for job in seen.values()), seen
    core.write_json(
        to / 'array.json',
        {
            'status': 'finished',
            **core.run_info({'experiment': 'distill', 'runs': list(ids)}, 0, {}),
            'metrics': {
                'slurm': said('sbatch', '--version').split()[-1],
                'arrays': len({i.split('_')[0] for i in ids.values()}),
                'tasks': sorted(i.split('_')[1] for i in ids.values()),
                'jobs': seen,
                'lora': {name: r['metrics']['lora'] for name, r in records.items()},
            },
            'cost': {name: r['cost']['wall_seconds'] for name, r in records.items()},
        },
    )
    write_table(to / 'array.csv', table(records))


@pytest.mark.slow
def test_slurm_jobs_that_fail_are_killed_or_waited_for_again(slurm, tmp_path):
    body = SLEEP.replace(
        'assert mode', "import time\nif mode == 'long': time.sleep(3 if seed == 2 else 600)\nassert mode"
    )
    path = notebook(tmp_path / 'a.ipynb', body)
    with pytest.raises(UserError, match='slurm options'):
        four(path, tmp_path / 'no', slurm_partiton='x')

    def ends(jobs, slurm):
        wait_for((tmp_path / 'f' / 'mode=long' / 'mode=long.json').is_file, 'the second job')
        subprocess.run(['scancel', jobs['mode=long'].job_id], check=True)
        return true(jobs, slurm)

    true, arrays._waiting = arrays._waiting, ends
    try:
        with pytest.raises(RunFailed) as e:
            sweep(
                path,
                {'mode': ['fail', 'long', 'x'], 'seed': [1]},
                tmp_path / 'f',
                slurm={'timeout_min': 5, 'cpus_per_task': 1},
            )
    finally:
        arrays._waiting = true
    assert (
        '2 of 3 runs failed' in str(e.value) and 'asked to' in str(e.value) and 'ended without a word' in str(e.value)
    )

    def leaves(*_):
        raise KeyboardInterrupt
        yield

    arrays._waiting = leaves
    again = lambda: sweep(
        path, {'mode': ['long', 'x'], 'seed': [2]}, tmp_path / 'w', slurm={'timeout_min': 5, 'cpus_per_task': 1}
    )
    try:
        with pytest.raises(KeyboardInterrupt, match='the same call waits'):
            again()
    finally:
        arrays._waiting = true
    assert [r['metrics']['tens'] for r in again().values()] == [20, 20]
