"The judge over HTTP against a real local server that misbehaves in every documented way."

import json
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest

from collectionlora.bases import endpoint
from collectionlora.bases.asking import key_of
from collectionlora.core import UserError
from collectionlora.judge import vlm

PNG = vlm.png(np.zeros((4, 4, 3), np.uint8), 8)
GATE = dict(evidence='cracks', effect_present=True, visible_defect=False)
SCORE = dict(evidence='same cat', score=4)


def case(id='a'):
    return vlm.Case(id, 'turns the subject to lava', 'the material', PNG, PNG + id.encode(), PNG)


def reply(text, **choice):
    message = dict(role='assistant', content=text) | choice.pop('message', {})
    return 200, dict(
        model='judge-1', choices=[dict(finish_reason='stop', message=message) | choice], usage=dict(total_tokens=100)
    )


def stage_of(body):
    return 'score' if 'score' in body['messages'][0]['content'][0]['text'].split('keys')[1] else 'gate'


def good(body, n=0):
    return reply(json.dumps(SCORE if stage_of(body) == 'score' else GATE))


@contextmanager
def serving(behave, **kw):
    "A judge behind a server whose n-th request (from 0) is answered by behave(body, n); see `endpoint.serving`."
    with endpoint.serving(behave, good) as (url, seen):
        yield vlm.Judge(url, 'judge-1', per_minute=1e6, longest_wait=0.02, **{'attempts': 4} | kw), seen


def verdict(judge, path, one=None):
    return vlm.Run(judge, vlm.Answers(path / 'answers.jsonl')).verdict(one or case())


def first(fault, times=1):
    "Misbehaves in the first `times` requests, then is good."
    return lambda body, n: fault if n < times else good(body)


PASSING = {
    '429': (429, 'slow down'),
    '429, Retry-After': (429, 'slow down', {'Retry-After': '0'}),
    '429, Retry-After as a date': (429, 'slow down', {'Retry-After': 'Wed, 21 Oct 2026 07:28:00 GMT'}),
    '500': (500, 'oops'),
    '502 with a page': (502, '<html>bad gateway</html>'),
    '503': (503, 'overloaded'),
    '529': (529, 'overloaded'),
    'cut stream': 'cut',
    'no answer in time': 'hang',
    '200 with a page': (200, '<html>hello</html>'),
    '200 without choices': (200, dict(choices=[])),
    '200 with an error': (200, dict(error=dict(message='upstream'))),
}


@pytest.mark.parametrize('name', PASSING)
def test_what_passes_is_asked_again(tmp_path, name):
    with serving(first(PASSING[name], 2), timeout=0.3) as (judge, seen):
        v = verdict(judge, tmp_path)
    assert v == vlm.Verdict('a', 'ok', True, False, 4, 'cracks') and len(seen) == 4


@pytest.mark.parametrize('name', ['429', '500', 'cut stream', '200 without choices'])
def test_a_judge_that_stays_down_stops_the_run(tmp_path, name):
    with (
        serving(lambda body, n: PASSING[name]) as (judge, seen),
        pytest.raises(UserError, match='4 attempts.*run the same'),
    ):
        verdict(judge, tmp_path)
    assert len(seen) == 4 and not (tmp_path / 'answers.jsonl').exists()


ENDING = {
    '401': ((401, 'invalid key'), 'refuses the key'),
    '403': ((403, 'forbidden'), 'refuses the key'),
    '404': ((404, 'model not found'), 'status 404 for model'),
    '400': ((400, 'image too small'), 'status 400 for model'),
    'no quota as 429': ((429, dict(error=dict(code='insufficient_quota'))), 'no quota'),
    'arrears as 400': ((400, dict(error=dict(code='Arrearage'))), 'no quota'),
}


@pytest.mark.parametrize('name', ENDING)
def test_what_ends_the_run_is_asked_once(tmp_path, name):
    fault, said = ENDING[name]
    with serving(lambda body, n: fault) as (judge, seen), pytest.raises(UserError, match=said):
        verdict(judge, tmp_path)
    assert len(seen) == 1


text = json.dumps(GATE)
ANSWERED = {
    'strict JSON': (reply(text), 'ok', 'strict', 1),
    'prose around JSON': (reply(f'Sure! {text} Hope this helps.'), 'ok', 'extracted', 1),
    'code fence': (reply(f'```json\n{text}\n```'), 'ok', 'extracted', 1),
    'content in parts': (reply([dict(type='text', text=text)]), 'ok', 'strict', 1),
    'the same twice': (reply(f'{text}\n{text}'), 'ok', 'extracted', 1),
    'two answers': (reply(f'{text}\n{text.replace("true", "false")}'), 'unparsable', '2 different answers', 2),
    'prose alone': (reply('I would say yes.'), 'unparsable', 'no JSON object', 2),
    'empty': (reply(''), 'unparsable', 'no JSON object', 2),
    'null content': (reply(None), 'unparsable', 'no JSON object', 2),
    'wrong type': (reply(text.replace('true', '"yes"')), 'unparsable', "'yes' is not of type 'boolean'", 2),
    'key missing': (
        reply('{"effect_present": true, "visible_defect": false}'),
        'unparsable',
        "'evidence' is a required property",
        2,
    ),
    'other key': (reply(text[:-1] + ', "score": 3}'), 'unparsable', 'Additional properties', 2),
    'a list': (reply(f'[{text}, 1]'), 'unparsable', 'not of type', 2),
    'cut JSON': (reply(text[:40], finish_reason='length'), 'unparsable', 'no JSON object', 2),
    'refusal': (reply(None, message=dict(refusal='I cannot help')), 'refused', '', 1),
    'filtered answer': (reply('', finish_reason='content_filter'), 'moderated', '', 1),
    'filtered question': ((400, dict(error=dict(code='data_inspection_failed'))), 'moderated', '', 1),
    'filtered question, Azure': ((400, dict(error=dict(code='content_filter'))), 'moderated', '', 1),
}


@pytest.mark.parametrize('name', ANSWERED)
def test_answers_are_recorded_and_never_imputed(tmp_path, name):
    said, state, how, requests = ANSWERED[name]
    with serving(lambda body, n: said if stage_of(body) == 'gate' else good(body)) as (judge, seen):
        v = verdict(judge, tmp_path)
        again = verdict(judge, tmp_path)  # from the file: nothing is asked a second time
    assert v == again and v.state == state and len(seen) == requests + (state == 'ok')
    row = json.loads((tmp_path / 'answers.jsonl').read_text().split('\n')[0])
    assert row['state'] == state and how in row['how']
    if state != 'ok':
        assert (v.present, v.defect, v.score) == (None, None, None)


@pytest.mark.parametrize('score', ['"4"', '3.5', '0', '6', 'true', 'null'])
def test_a_score_of_another_type_or_range_is_no_score(tmp_path, score):
    bad = reply(f'{{"evidence": "", "score": {score}}}')
    with serving(lambda body, n: bad if stage_of(body) == 'score' else good(body)) as (judge, _):
        v = verdict(judge, tmp_path)
    table = vlm.gate_table([v])
    assert v.state == 'unparsable' and v.score is None and table['valid'] == 0 and np.isnan(table['vsa'])


def test_one_repair_is_asked_for_and_recorded(tmp_path):
    with serving(first(reply('Yes, it is there.'))) as (judge, seen):
        assert verdict(judge, tmp_path).valid
    second = seen[1][1]['messages']
    assert [m['role'] for m in second] == ['user', 'assistant', 'user'] and 'no JSON object' in second[2]['content']
    assert json.loads((tmp_path / 'answers.jsonl').read_text().split('\n')[0])['how'] == 'strict, repaired'


@pytest.mark.parametrize('known, rung', [((), 'text'), (('json_object',), 'json_object')])
def test_an_endpoint_without_schemas_is_asked_less_strictly(tmp_path, known, rung):
    def behave(body, n):
        kind = body.get('response_format', {}).get('type')
        return good(body) if kind in (None, *known) else (400, f'response_format {kind} is not supported')

    with serving(behave) as (judge, _):
        assert verdict(judge, tmp_path).valid
    assert {json.loads(line)['rung'] for line in (tmp_path / 'answers.jsonl').read_text().splitlines()} == {rung}


def test_a_stopped_run_goes_on_where_it_was(tmp_path):
    cases, limit = [case(f'c{i}') for i in range(12)], [9]
    with serving(lambda body, n: good(body) if n < limit[0] else (500, '')) as (judge, seen):
        with pytest.raises(UserError, match='what was answered is kept'):
            vlm.judge_cases(vlm.Run(judge, vlm.Answers(tmp_path / 'a.jsonl')), cases, workers=2)
        assert len(vlm.Answers(tmp_path / 'a.jsonl').known) == 9
        with open(tmp_path / 'a.jsonl', 'a') as f:
            f.write('{"key": "cut off here')
        limit[0] = 10**6
        run = vlm.Run(judge, vlm.Answers(tmp_path / 'a.jsonl'))
        whole = vlm.judge_cases(run, cases, workers=3)
    assert run.asked == 24 - 9 and [v.id for v in whole] == [c.id for c in cases] and all(v.valid for v in whole)
    assert len(vlm.Answers(tmp_path / 'a.jsonl').known) == 24


def test_results_do_not_depend_on_threads_or_order(tmp_path):
    def behave(body, n):
        odd = sum(map(ord, json.dumps(sorted(map(str, body['messages'][0]['content']))))) % 2
        return (
            (429, '', {'Retry-After': '0'})
            if n % 5 == 4
            else reply(json.dumps(GATE | dict(effect_present=bool(odd)) if stage_of(body) == 'gate' else SCORE))
        )

    cases = [case(f'{"x" * i}{i}') for i in range(10)]
    with serving(behave) as (judge, _):
        one = vlm.judge_cases(vlm.Run(judge, vlm.Answers(tmp_path / '1.jsonl')), cases, workers=1)
        many = vlm.judge_cases(vlm.Run(judge, vlm.Answers(tmp_path / '8.jsonl')), cases[::-1], workers=8)
    assert one == many[::-1] and len({v.present for v in one}) == 2


def test_pace_budget_and_key(tmp_path, monkeypatch):
    monkeypatch.setenv('JUDGE_API_KEY', 'secret')
    with serving(good) as (judge, seen):
        slow = replace(judge, per_minute=60 / 0.05)
        vlm.judge_cases(vlm.Run(slow, vlm.Answers(tmp_path / 'a.jsonl')), [case('a'), case('b')], workers=4)
        times = [t for t, _, _ in seen]
        assert len(seen) == 4 and min(np.diff(times)) > 0.03
        assert {h['Authorization'] for _, _, h in seen} == {'Bearer secret'}
        poor = vlm.Run(replace(judge, budget=150), vlm.Answers(tmp_path / 'b.jsonl'))
        with pytest.raises(UserError, match='budget of 150 tokens'):
            vlm.judge_cases(poor, [case(str(i)) for i in range(5)], workers=1)
        assert len(poor.answers.known) == 2
    assert 'secret' not in (tmp_path / 'a.jsonl').read_text()


def test_a_question_names_no_method_and_changes_the_key():
    asked = vlm.messages(case(), 'gate')
    keys = {
        key_of(vlm.Judge('u', m), vlm.messages(c, s, seed), s, r)
        for m in ('m', 'n')
        for c in (case(), case('b'))
        for s in ('gate', 'score')
        for seed in (0, 1)
        for r in (0, 1)
    }
    assert len(asked[0]['content']) == 7 and len(keys) >= 16


def test_the_identity_of_the_gate_holds_with_every_kind_of_answer():
    v = [vlm.Verdict(str(i), 'ok', i % 3 > 0, False, 1 + i % 5 if i % 3 else None) for i in range(20)]
    v += [vlm.Verdict('r', 'refused'), vlm.Verdict('m', 'moderated'), vlm.Verdict('u', 'unparsable', True, False)]
    t = vlm.gate_table(v)
    assert t['vsa'] == pytest.approx((1 - t['bcr']) * t['kept']) and (t['n'], t['valid']) == (23, 20)
    assert (t['refused'], t['moderated'], t['unparsable']) == (1, 1, 1) and t['low'] == 7 / 23 and t['high'] == 10 / 23
    nothing = vlm.gate_table(v[20:])
    assert np.isnan(nothing['bcr']) and nothing['low'] == 0 and nothing['high'] == 1


def test_agreement_leaves_missing_answers_out():
    pytest.importorskip('krippendorff')
    a = [vlm.Verdict(str(i), 'ok', i % 2 == 0, False, 3) for i in range(10)]
    b = [*a[:8], vlm.Verdict('8', 'refused'), vlm.Verdict('9', 'moderated')]
    assert vlm.agreement(a, b) == 1 and vlm.flips(a, b) == 0
    worse = [replace(v, present=not v.present) if v.valid and v.id in '01' else v for v in b]
    assert vlm.agreement(a, worse) < 0.6 and vlm.flips(a, worse) == 0.25
    with pytest.raises(UserError, match='same cases'):
        vlm.agreement(a, b[::-1])


def test_a_file_of_other_lines_is_refused(tmp_path):
    (tmp_path / 'a.jsonl').write_text('{"some": "thing"}\n')
    with pytest.raises(UserError, match='line 1'):
        vlm.Answers(tmp_path / 'a.jsonl')
