"Triggers, the student's prompt, and the describers against a server on this machine, a model of random weights, and refusals."

import base64
import io
import json

import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image

from collectionlora import aop, world
from collectionlora.aop import check_triggers, make_triggers, student_prompt, trigger_cosines, words_of
from collectionlora.bases.endpoint import serving
from collectionlora.bases.pipeline import load_base
from collectionlora.bases.tiny import tiny_base
from collectionlora.core import read_yaml, UserError, write_yaml
from collectionlora.engine.words import (
    clean,
    LocalQwenVL,
    OpenAIVision,
    read_prompts,
    Refusal,
    rewrite,
    with_prompts,
    WorldDescriber,
    write_prompts,
)
from collectionlora.files.effects import write_effect

PAIR = Image.new('RGB', (16, 16), (10, 20, 30)), Image.new('RGB', (16, 16), (200, 100, 0))


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return tiny_base(tmp_path_factory.mktemp('tiny'))


# --- triggers
@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.text('abcdefgh_0', min_size=1, max_size=8), unique=True, min_size=2, max_size=40),
    st.integers(0, 2**31),
    st.sets(st.text('aeioubdkmz', min_size=2, max_size=6), max_size=30),
)
def test_triggers_are_distinct_new_and_stable(ids, seed, taken):
    made = make_triggers(ids, seed, taken)
    check_triggers(made, taken)
    assert list(made) == ids and make_triggers(ids[:-1], seed, taken) == {i: made[i] for i in ids[:-1]}
    assert all(t.isalpha() and t.islower() and 5 <= len(t) <= 7 for t in made.values())


@pytest.mark.parametrize(
    'triggers, taken',
    [
        ({'a': 'zorvik', 'b': 'Zorvik'}, ()),
        ({'a': 'zorvik', 'b': 'zorvika'}, ()),
        ({'a': 'Painting'}, ('painting',)),
        ({'a': 'cat'}, ('cat',)),
        ({'a': ' '}, ()),
    ],
)
def test_confusable_triggers_are_refused(triggers, taken):
    with pytest.raises(UserError, match="effect '[ab]'"):
        check_triggers(triggers, taken)


def test_short_words_inside_a_trigger_do_no_harm():
    check_triggers({'a': 'zocatum'}, ('cat', 'um', 'a'))


def test_student_prompt():
    assert student_prompt('zorvik', ' An oil painting. ', 'animal') == 'zorvik, an oil painting, keep the same animal'
    assert student_prompt('zorvik', 'Turn it blue while preserving it; preserve the face', 'animal').count('keep') == 0
    for bad in (('', 'x', 'animal'), ('x', ' ', 'animal'), (None, 'x', 'animal')):
        with pytest.raises(UserError, match='is empty'):
            student_prompt(*bad)
    assert aop.compose(['a.', 'b']) == 'a; and b'


def test_cosines(folder):
    base = load_base(folder)
    C = trigger_cosines(base, {'a': 'zorvik', 'b': 'milap', 'c': 'bedun'})
    assert C.shape == (3, 3) and torch.allclose(C, C.T) and torch.allclose(C.diagonal(), torch.ones(3), atol=1e-5)
    words = ['zorvik', 'mi', 'bedunafokalimu']
    together, alone = aop.trigger_embeddings(base, words), torch.cat([aop.trigger_embeddings(base, [w]) for w in words])
    assert torch.allclose(together, alone, atol=1e-5)  # lengths and padding do not matter
    with pytest.raises(UserError, match='at least two'):
        trigger_cosines(base, ['zorvik'])


def test_the_measured_tokens_are_the_triggers(folder):
    base = load_base(folder)
    grey = Image.new('RGB', (64, 64), (128, 128, 128))
    emb, _ = base.encode_prompts([grey], ['zorvik'])
    n = len(base.pipe.tokenizer('zorvik')['input_ids'])
    other, _ = base.encode_prompts([grey], ['milap'])
    changed = [
        i for i in range(min(emb.shape[1], other.shape[1])) if not torch.allclose(emb[0, i], other[0, i], atol=1e-6)
    ]
    mean = aop.trigger_embeddings(base, ['zorvik'])[0]
    assert torch.allclose(mean, emb[0, changed[0] : changed[0] + n].mean(0), atol=1e-5)


def test_chosen_triggers_are_spread_out_and_stable(folder):
    base, ids = load_base(folder), [f'e{i}' for i in range(6)]
    chosen = aop.choose_triggers(base, ids, 0, taken=['painting'])
    check_triggers(chosen, ['painting'])
    worst = lambda t: (trigger_cosines(base, t) - 2 * torch.eye(len(t))).max()
    drawn = sum(worst(make_triggers(ids, seed)) for seed in range(5)) / 5
    assert worst(chosen) < drawn
    assert aop.choose_triggers(base, ids[:4], 0, taken=['painting']) == {i: chosen[i] for i in ids[:4]}
    kept = list(chosen.values())[:4]
    more = aop.choose_triggers(base, ['new'], 0, kept=kept)
    check_triggers({**{str(i): k for i, k in enumerate(kept)}, **more})
    with pytest.raises(UserError, match="effect 'new'"):
        aop.choose_triggers(base, ['new'], 0, kept=kept, candidates=0)


# --- answers
def test_clean():
    assert clean(' "Turn  it\n blue."\n') == 'Turn it blue.' and clean('**- red**') == 'red'
    with pytest.raises(UserError, match='empty'):
        clean(' "" ')
    with pytest.raises(UserError, match='characters'):
        clean('x' * 601)


def test_rewrite_opens_files_and_takes_two_pairs(tmp_path):
    PAIR[0].save(tmp_path / 'a.png')
    seen = []

    def backend(pairs, prompt):
        seen.append((pairs, prompt))
        return 'fine'

    assert rewrite([(tmp_path / 'a.png', PAIR[1])] * 5, 'old words', backend) == 'fine'
    assert len(seen[0][0]) == 2 and seen[0][0][0][0].getpixel((0, 0)) == (10, 20, 30) and seen[0][1] == 'old words'
    with pytest.raises(UserError, match='no pairs'):
        rewrite([], 'x', backend)


def test_the_world_describes_its_own_effects_only():
    id = sorted(world.EFFECTS)[0]
    assert rewrite([PAIR], 'x', WorldDescriber(id)) == world.describe(id)
    with pytest.raises(UserError, match=f'did you mean.*{id}'):
        WorldDescriber(id + 's')


# --- a server on this machine
def answer(text='a neon sign', **message):
    return 200, {}, json.dumps({'choices': [{'message': {'content': text, **message}, 'finish_reason': 'stop'}]})


class Server:
    "Replies (status, headers, text) one after the other, then 500; requests are (path, headers, body)."

    def __init__(self):
        self.replies, self.url, self.seen = [], '', []

    def behave(self, body, n):
        status, headers, text = self.replies.pop(0) if self.replies else (500, {}, 'used up')
        return status, text, {'Content-Type': 'application/json', **headers}


@pytest.fixture
def server():
    made = Server()
    with serving(made.behave) as (made.url, made.seen):
        yield made


@pytest.fixture
def ask(server):
    return lambda **kw: rewrite(
        [PAIR, PAIR],
        'do it',
        OpenAIVision(server.url, 'some-model', **{'longest_wait': 0.01, 'attempts': 3, **kw}),
    )


def test_pictures_and_words_are_sent(server, ask, monkeypatch):
    monkeypatch.setenv('MY_KEY', 'abc')
    server.replies.append(answer('"A neon sign"'))
    assert ask(key_env='MY_KEY') == 'A neon sign'
    _, body, headers = server.seen[0]
    assert headers['Authorization'] == 'Bearer abc' and body['model'] == 'some-model'
    parts = body['messages'][0]['content']
    urls = [p['image_url']['url'] for p in parts if p['type'] == 'image_url']
    opened = [Image.open(io.BytesIO(base64.b64decode(u.removeprefix('data:image/png;base64,')))) for u in urls]
    assert [im.getpixel((3, 3)) for im in opened] == [(10, 20, 30), (200, 100, 0)] * 2 and '"do it"' in parts[0]['text']


@pytest.mark.parametrize('status', [429, 500, 503])
def test_busy_servers_are_asked_again(server, ask, status):
    server.replies += [(status, {'Retry-After': '0'}, '{}'), (status, {}, '{}'), answer()]
    assert ask() == 'a neon sign' and len(server.seen) == 3


def test_patience_ends(server, ask):
    server.replies += [(503, {}, '{}')] * 9
    with pytest.raises(UserError):
        ask()
    assert len(server.seen) == 3


def test_final_errors_are_not_repeated(server, ask):
    server.replies += [(401, {}, '{"error": {"message": "wrong key"}}'), answer()]
    with pytest.raises(UserError, match='wrong key'):
        ask()
    assert len(server.seen) == 1


@pytest.mark.parametrize(
    'text', ['<html>hello</html>', '{"object": "list"}', '[]', '{"choices": []}', '', '{"choices": [7]}']
)
def test_answers_that_are_no_answers(server, ask, text):
    server.replies += [(200, {}, text)] * 3
    with pytest.raises(UserError, match=server.url):
        ask()


@pytest.mark.parametrize(
    'choice',
    [
        {'message': {'content': None, 'refusal': 'I would rather not'}},
        {'message': {'content': 'I would rather not'}, 'finish_reason': 'content_filter'},
    ],
)
def test_refusals_are_told_apart(server, ask, choice):
    server.replies.append((200, {}, json.dumps({'choices': [choice]})))
    with pytest.raises(Refusal, match='rather not'):
        ask()


def test_empty_answer(server, ask):
    server.replies.append(answer(None))
    with pytest.raises(UserError, match='empty description'):
        ask()


def test_nobody_listens(ask):
    with pytest.raises(UserError, match='127.0.0.1'):
        rewrite([PAIR], 'do it', OpenAIVision('http://127.0.0.1:9/v1', 'm', attempts=2, longest_wait=0.01))


def test_no_address():
    for url in ('localhost:8000/v1', 'nothing', 'http://'):
        with pytest.raises(UserError, match='is no address'):
            rewrite([PAIR], 'do it', OpenAIVision(url, 'm'))


def test_a_filtered_question_is_a_refusal(server, ask):
    server.replies.append((400, {}, '{"error": {"code": "content_filter"}}'))
    with pytest.raises(Refusal, match='content filter'):
        ask()


# --- a local model
def test_local_model_of_random_weights(folder, tmp_path):
    for place in (folder, folder / 'text_encoder'):
        if place != folder:
            for f in (folder / 'processor').iterdir():
                (place / f.name).write_bytes(f.read_bytes())
        backend = LocalQwenVL(place, max_new_tokens=4)
        text = backend([PAIR, PAIR], 'do it')
        assert isinstance(text, str) and text == backend([PAIR, PAIR], 'do it')
    with pytest.raises(UserError, match='holds no Qwen2.5-VL'):
        LocalQwenVL(tmp_path)
    (tmp_path / 'config.json').write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match='cannot be loaded'):
        LocalQwenVL(tmp_path)


# --- prompts.yaml
@pytest.fixture
def effects(tmp_path):
    extra = {'a': {}, 'b': {'trigger': 'MyLook'}, 'c': {'description': 'my words'}}
    return [
        write_effect(tmp_path / 'fx' / id, id=id, category='animal', prompt='apply the effect', pairs=[PAIR] * 3, **kw)
        for id, kw in extra.items()
    ]


def test_prompts_are_completed_and_never_overwritten(effects, tmp_path):
    path, asked = tmp_path / 'prompts.yaml', []

    def backend_for(effect):
        def backend(pairs, prompt):
            asked.append(effect.id)
            return f'the look of {effect.id}'

        return backend

    first = write_prompts(effects[:2], backend_for, 0, path)
    assert first['b'] == {'trigger': 'MyLook', 'description': 'the look of b', 'by': 'function'} and asked == ['a', 'b']
    first['a']['description'] = 'edited by hand'
    write_yaml(path, first)
    second = write_prompts(effects, backend_for, 1, path)
    assert second['a'] == first['a'] and second['c']['description'] == 'my words' and asked == ['a', 'b']
    assert [e.description for e in with_prompts(effects, path)] == ['edited by hand', 'the look of b', 'my words']
    assert with_prompts(effects, path)[0].pairs_hash == effects[0].pairs_hash


def test_triggers_in_prompts_are_chosen_on_a_base(effects, tmp_path, folder):
    base, say = load_base(folder), lambda e: lambda pairs, prompt: 'x y'
    entries = write_prompts(effects, say, 0, tmp_path / 'p.yaml', base=base)
    assert entries['b']['trigger'] == 'MyLook' and entries == write_prompts(
        effects, say, 0, tmp_path / 'p.yaml', base=base
    )
    assert (
        entries['a']['trigger']
        == aop.choose_triggers(base, ['a'], 0, words_of(['apply the effect', 'my words', 'animal']), kept=['MyLook'])[
            'a'
        ]
    )


def test_what_was_written_survives_a_failure(effects, tmp_path):
    def backend_for(effect):
        def backend(pairs, prompt):
            if effect.id == 'b':
                raise UserError('the server is gone')
            return 'fine'

        return backend

    with pytest.raises(UserError, match='gone'):
        write_prompts(effects, backend_for, 0, tmp_path / 'prompts.yaml')
    assert list(read_prompts(tmp_path / 'prompts.yaml')) == ['a']


def test_a_refusal_is_recorded(effects, tmp_path):
    def backend_for(effect):
        def backend(pairs, prompt):
            raise Refusal('not this one')

        return backend

    entry = write_prompts(effects[:1], backend_for, 0, tmp_path / 'p.yaml')['a']
    assert entry['description'] == 'apply the effect' and entry['refusal'] == 'not this one'


def test_triggers_avoid_all_words_in_use(effects, tmp_path):
    drawn = make_triggers(['a'], 0)['a']
    entries = write_prompts(
        effects, lambda e: lambda pairs, prompt: 'x y', 0, tmp_path / 'p.yaml', taken=[f'a sentence with {drawn} in it']
    )
    assert entries['a']['trigger'] != drawn and words_of(['A b-c1']) == {'a', 'b', 'c'}


@pytest.mark.parametrize(
    'entry, said',
    [
        ({'trigger': 'x', 'descripton': 'y'}, "did you mean 'description'"),
        ({'trigger': '', 'description': 'y'}, "'trigger' is missing or empty"),
        ({'trigger': 'x'}, "'description' is missing"),
        ('x', 'must hold'),
    ],
)
def test_mistakes_in_prompts_yaml(tmp_path, entry, said):
    write_yaml(tmp_path / 'p.yaml', {'a': entry})
    with pytest.raises(UserError, match=said):
        read_prompts(tmp_path / 'p.yaml')


def test_a_missing_entry_and_double_triggers(effects, tmp_path):
    write_yaml(tmp_path / 'p.yaml', {'a1': {'trigger': 'zorvik', 'description': 'x'}})
    with pytest.raises(UserError, match="no entry for effect 'a'"):
        with_prompts(effects, tmp_path / 'p.yaml')
    write_yaml(tmp_path / 'p.yaml', {i: {'trigger': 'zorvik', 'description': 'x'} for i in 'ab'})
    with pytest.raises(UserError, match='cannot be told'):
        with_prompts(effects, tmp_path / 'p.yaml')
    assert list(read_yaml(tmp_path / 'p.yaml')) == ['a', 'b']
