"The blind study: no method shows through, votes are read strictly, and the statistics find what was put in."

import base64
import io
import json
import re

import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from typer.testing import CliRunner

from collectionlora import core
from collectionlora.core import UserError
from collectionlora.run import cli
from collectionlora.use import study

METHODS = ('base', 'lightning', 'all in one', 'ours')
WORTH = dict(zip(METHODS, (0.5, -1.0, -0.5, 1.0)))


@pytest.fixture(scope='module')
def index(tmp_path_factory):
    "Pictures whose sizes, formats, colours and metadata all give the method away."
    folder, rows, g = tmp_path_factory.mktemp('pictures'), [], np.random.default_rng(0)
    for e in range(6):
        for i in range(4):
            for c, column in enumerate(('source', 'target', *METHODS)):
                side = 40 + 8 * c if column in METHODS else 48
                pixels = g.integers(0, 20 + 40 * c, (side, side, 3), dtype=np.uint8)
                file = f'{e}-{i}-{column.replace(" ", "_")}.{"png" if c % 2 else "jpg"}'
                note = PngImagePlugin.PngInfo()
                note.add_text('Comment', column)
                more = dict(pnginfo=note) if c % 2 else dict(comment=column.encode())
                Image.fromarray(pixels).save(folder / file, **more)
                rows.append(dict(effect=f'effect_{e}', image=f'i{i}', column=column, file=file))
    core.write_json(folder / 'index.json', dict(pictures=rows))
    (folder / 'rows.jsonl').write_text('\n'.join(map(json.dumps, rows)) + '\n')
    return folder / 'index.json'


@pytest.fixture(scope='module')
def made(index, tmp_path_factory):
    "(page, key) of a study of all cases."
    page, key = study.make(
        study.cases_of(index, seed=1), tmp_path_factory.mktemp('study') / 's.html', seed=1, repeats=2
    )
    return page, core.read_json(key)


def held(page):
    "What the page holds, read back from the HTML."
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.S)
    return json.loads(data[1])


def test_no_name_of_a_method_or_file_is_on_the_page(made):
    page, key = made
    text = re.sub(r'base64,[A-Za-z0-9+/=]+', '', page.read_text())
    inside = text.split('id="data">')[1].split('</script>')[0]
    assert not [m for m in METHODS if m in inside or m.replace(' ', '_') in inside]
    assert '.png' not in inside and '.jpg' not in inside and 'http' not in text
    for case in held(page)['cases']:
        assert set(case) == {'id', 'effect', 'says', 'source', 'example', 'results'}


def test_pictures_of_a_case_have_one_size_one_length_and_no_note(made):
    for case in held(made[0])['cases']:
        raw = [base64.b64decode(uri.split(',')[1]) for _, uri in case['results']]
        pictures = [Image.open(io.BytesIO(b)) for b in raw]
        assert len({len(b) for b in raw}) == len({p.size for p in pictures}) == len({p.format for p in pictures}) == 1
        assert {p.size for p in pictures} == {(48, 48)} and not any(p.info for p in pictures)


def test_order_and_words_say_nothing(made):
    page, key = made
    cases = held(page)['cases']
    places = np.zeros((4, 4))
    for case in cases:
        names = key['cases'][case['id']]['results']
        assert sorted(names.values()) == sorted(METHODS)
        for position, (word, _) in enumerate(case['results']):
            places[METHODS.index(names[word]), position] += 1
    from scipy.stats import chi2_contingency

    assert chi2_contingency(places).pvalue > 0.01, places
    words = [w for c in cases for w, _ in c['results']]
    assert len(set(words)) == len(words) == 96
    order = [key['cases'][c['id']]['effect'] for c in cases]
    assert all(len(set(order[k : k + 6])) == 6 for k in (0, 6, 12, 18))  # effects in turn


def test_the_seed_decides_and_another_key_is_not_overwritten(index, tmp_path):
    cases = study.cases_of(index, seed=1)
    first = study.make(cases, tmp_path / 'a.html', seed=1)[0].read_text()
    assert study.make(cases, tmp_path / 'a.html', seed=1)[0].read_text() == first
    with pytest.raises(UserError, match='key of another study'):
        study.make(cases, tmp_path / 'a.html', seed=2)
    assert study.make(cases, tmp_path / 'b.html', seed=2)[0].read_text() != first


def test_the_example_is_never_the_answer(index):
    for case in study.cases_of(index):
        assert case.example and case.example.name.split('-')[1] != case.source.name.split('-')[1]
    assert [c.results for c in study.cases_of(index)] == [
        c.results for c in study.cases_of(index.with_name('rows.jsonl'))
    ]
    assert len(study.cases_of(index, ['ours', 'base'], most=5)) == 5


def test_mistakes_in_the_index_are_named(index, tmp_path):
    for given, word in (
        (lambda: study.cases_of(index, ['our']), "did you mean 'ours'?"),
        (lambda: study.cases_of(index, ['ours']), 'two to six'),
        (lambda: study.cases_of(tmp_path / 'no.json'), 'no such file'),
        (lambda: study.cases_of(_written(tmp_path / 'x.json', '{"pictures": [{"effect": 1}]}')), 'picture 0'),
        (lambda: study.cases_of(_written(tmp_path / 'x.jsonl', '{nothing')), 'no JSON'),
        (lambda: study.read_key(index), 'no key of a study'),
        (lambda: study.read_key(tmp_path / 'no.json'), 'no such file'),
    ):
        with pytest.raises(UserError, match=re.escape(word)):
            given()


def _written(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def _solid(path, level):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', (16, 16), (level, 0, 0)).save(path)


def test_a_folder_of_folders_needs_no_index(tmp_path):
    for column, level in (('source', 0), ('target', 50), ('new base', 100), ('old', 150), ('.cache', 9)):
        for name in ('rainy/cat', 'rainy/dog', 'note', 'plain'):
            _solid(tmp_path / column / f'{name}.{"jpg" if column == "old" else "png"}', level)
    _written(tmp_path / 'source/note.txt', ' make it night\n')
    _solid(tmp_path / 'old/rainy/extra.png', 7)  # has no source, so it is no case
    cases = {c.image: c for c in study.cases_of(tmp_path)}
    assert {k: c.effect for k, c in cases.items()} == {
        'rainy/cat': 'rainy', 'rainy/dog': 'rainy', 'note': 'make it night', 'plain': 'plain'
    }
    assert all(list(c.results) == ['new base', 'old'] for c in cases.values())
    assert cases['rainy/cat'].example == tmp_path / 'target/rainy/dog.png' and cases['note'].example is None
    _solid(tmp_path / 'old/note.png', 3)
    assert 'called note too' in core.refusal(study.cases_of, tmp_path)
    assert 'has no folder source' in core.refusal(study.cases_of, tmp_path / 'old')


@pytest.mark.parametrize(
    'change, word',
    [
        (dict(study='other'), 'give its own key'),
        (dict(case='nocase'), 'is no vote'),
        (dict(question='beauty'), 'questions'),
        (dict(chosen=['xxxxxx']), 'is no vote'),
        (dict(chosen=3), 'is no vote'),
        (dict(seconds='soon'), 'is no vote'),
    ],
)
def test_a_wrong_vote_names_file_and_line(made, tmp_path, change, word):
    key = made[1]
    lines = study.simulated(key, WORTH, 1)[:3]
    lines[1] |= change
    file = _written(tmp_path / 'v.jsonl', '\n'.join(map(json.dumps, lines)))
    with pytest.raises(UserError, match=f'v.jsonl, line 2.*{word}'):
        study.read_votes([file], key)
    with pytest.raises(UserError, match='hold no vote'):
        study.read_votes([_written(tmp_path / 'e.jsonl', '')], key)


def test_the_last_answer_counts_and_a_second_look_is_apart(made, tmp_path):
    key = made[1]
    one = study.simulated(key, WORTH, 1)[0]
    other = next(w for w in one['shown'] if w not in one['chosen'])
    lines = [one, one | {'chosen': [other]}, one | {'pass': 2}]
    votes = study.read_votes([_written(tmp_path / 'v.jsonl', '\n'.join(map(json.dumps, lines)))], key)
    assert [v.again for v in votes] == [1, 2] and votes[0].chosen == (key['cases'][one['case']]['results'][other],)
    assert study._same_again(votes) == dict(same=0, n=1)


def test_two_people_of_one_name_are_not_merged_and_a_file_that_was_saved_twice_is(made, tmp_path):
    key = made[1]
    mine = study.simulated(key, WORTH, 1)[:9]
    theirs = [line | {'seconds': 8.5} for line in mine]
    files = [_written(tmp_path / f'{n}.jsonl', '\n'.join(map(json.dumps, x))) for n, x in (('a', mine), ('b', theirs))]
    with pytest.raises(UserError, match="b.jsonl: 'r0' answered all otherwise in .*a.jsonl; rename one of the two"):
        study.read_votes(files, key)
    later = _written(tmp_path / 'c.jsonl', '\n'.join(map(json.dumps, [theirs[0], *mine[1:]])))
    assert len(study.read_votes([files[0], later], key)) == 9


def votes_of(key, seed=0, raters=8, **kw):
    return [study._vote(row, key, 'simulated') for row in study.simulated(key, WORTH, raters, seed, **kw)]


def test_a_panel_with_known_tastes_is_found_again(made):
    key = made[1]
    found = study.score(votes_of(key, raters=16), key)
    p = np.exp([WORTH[m] for m in key['methods']])
    for q in found['questions'].values():
        assert q['ranking'][:2] == ['ours', 'base']
        for m, true in zip(key['methods'], p / p.sum()):
            assert abs(q['shares'][m]['value'] - true) < 0.1
            assert q['shares'][m]['low'] <= q['shares'][m]['value'] <= q['shares'][m]['high']
            assert abs(q['worths'][m] - WORTH[m]) < 0.45
        assert q['lead']['low'] < q['lead']['difference'] < q['lead']['high']
    assert found['ties'] == 0 and found['raters'] == 16 and found['effects'] == 6
    assert study.score(votes_of(key, ties=0.2), key)['ties'] > 0


def test_a_clear_lead_is_clear_and_none_is_none(made):
    key = made[1]
    for worth, clear in (({m: 3 * w for m, w in WORTH.items()}, True), (dict.fromkeys(METHODS, 0.0), False)):
        votes = [study._vote(row, key, 's') for row in study.simulated(key, worth, 10, seed=4)]
        leads = [q['lead'] for q in study.score(votes, key)['questions'].values()]
        assert all((lead['low'] > 0) == clear for lead in leads), leads


def test_the_ranking_turns_when_the_preferences_do(made):
    key = made[1]
    turned = [study._vote(row, key, 's') for row in study.simulated(key, {m: -w for m, w in WORTH.items()}, 8)]
    assert study.score(turned, key)['questions']['style']['ranking'][0] == 'lightning'


def test_agreement_is_one_for_a_panel_of_one_mind_and_none_by_chance(made):
    key = made[1]
    table = study.ballots(votes_of(key), key, 'style')[0]
    same = np.repeat(table[:1], 4, 0)
    assert study.agreement(same) == pytest.approx(1)
    equal = [study._vote(r, key, 's') for r in study.simulated(key, dict.fromkeys(METHODS, 0.0), 20)]
    assert abs(study.agreement(study.ballots(equal, key, 'style')[0])) < 0.1
    assert np.isnan(study.agreement(table[:1]))


def test_worths_are_those_of_the_wins():
    true = np.array([1.0, 0.0, -1.0])
    chance = 1 / (1 + np.exp(true[None] - true[:, None]))
    wins = 1000 * chance * (1 - np.eye(3))
    assert study.worths(wins) == pytest.approx(true, abs=0.01)
    assert np.isfinite(study.worths(np.array([[0, 5, 5], [0, 0, 5], [0, 0, 0.0]]))).all()


def test_a_tie_is_shared_and_unsure_is_no_vote(made):
    key = made[1]
    case, entry = next(iter(key['cases'].items()))
    word = {m: w for w, m in entry['results'].items()}
    row = dict(study=key['study'], rater='a', case=case, question='style', shown=list(word.values()))
    both = study._vote(row | dict(chosen=[word['ours'], word['base']]), key, 's')
    unsure = study._vote(row | dict(chosen=[], rater='b'), key, 's')
    table, raters, _ = study.ballots([both, unsure], key, 'style')
    got = dict(zip(key['methods'], table[0, list(key['cases']).index(case)]))
    assert got == {'base': 0.5, 'lightning': 0, 'all in one': 0, 'ours': 0.5} and raters == ['a', 'b']
    assert np.isnan(table[1]).all()
    wins = study.wins_of(table)
    k = {m: i for i, m in enumerate(key['methods'])}
    assert wins[k['ours'], k['base']] == wins[k['base'], k['ours']] == 0.5 and wins[k['ours'], k['lightning']] == 1
    with pytest.raises(UserError, match='nobody chose'):
        study.score([unsure], key)


def test_intervals_widen_with_the_tastes_of_effects(made):
    key = made[1]
    widths = []
    for spread in (0.0, 1.5):
        table, _, effect = study.ballots(votes_of(key, seed=3, raters=30, spread=spread), key, 'quality')
        draws = study.resampled(table, effect)
        widths.append(np.diff(np.quantile(draws[:, 0] / draws.sum(1), [0.025, 0.975]))[0])
    assert widths[1] > 1.5 * widths[0]


def test_the_commands(index, tmp_path):
    run = lambda *a: CliRunner().invoke(cli.app, ['study', *map(str, a)])
    made = run('make', index, '--out', tmp_path / 's.html', '--cases', 6, '-m', 'ours', '-m', 'base')
    assert made.exit_code == 0, made.output
    key = core.read_json(tmp_path / 's.key.json')
    assert len(key['cases']) == 6 and sorted(key['methods']) == ['base', 'ours']
    lines = study.simulated(key, dict(base=0.0, ours=2.0), 4)
    votes = _written(tmp_path / 'v.jsonl', '\n'.join(map(json.dumps, lines)))
    told = run('score', votes, '--key', tmp_path / 's.key.json')
    assert told.exit_code == 0 and 'share of votes' in told.output and 'even' in told.output, told.output
    found = json.loads(run('score', votes, '--key', tmp_path / 's.key.json', '--json').output)
    assert found['questions']['style']['ranking'][0] == 'ours'
    assert run('score', tmp_path / 'no.jsonl', '--key', tmp_path / 's.key.json').exit_code == 2
    for column, level in (('source', 0), ('old', 90), ('new', 200)):
        _solid(tmp_path / 'both' / column / 'make_it_red.png', level)
    two = run('make', tmp_path / 'both', '--out', tmp_path / 'two.html')
    assert two.exit_code == 0 and held(tmp_path / 'two.html')['cases'][0]['effect'] == 'make it red', two.output


# ---- in a browser


def opened(browser, page, width, **kw):
    "A page of the study that reports every error, and what it reported."
    context = browser.new_context(viewport=dict(width=width, height=850), accept_downloads=True, **kw)
    tab, errors = context.new_page(), []
    tab.on('pageerror', lambda e: errors.append(str(e)))
    tab.on('request', lambda r: errors.append(r.url) if not r.url.startswith(('file:', 'data:', 'blob:')) else None)
    tab.goto(page.as_uri())
    return tab, errors


def start(tab, name):
    tab.fill('#rater', name)
    tab.click('#begin button')
    tab.wait_for_selector('#work:not([hidden]), #end:not([hidden])')


def saved(tab, button):
    "The lines that a save button writes."
    with tab.expect_download() as download:
        tab.click(button)
    return [json.loads(l) for l in open(download.value.path()).read().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize('width', [400, 1400])
def test_a_person_answers_all_by_keys_ties_and_goes_back(browser, made, tmp_path, width):
    page, key = made
    tab, errors = opened(browser, page, width)
    start(tab, 'Ada')
    assert tab.inner_text('#count') == '1 of 26'
    assert tab.evaluate('document.documentElement.scrollWidth') <= width
    tab.keyboard.press('2')
    tab.wait_for_function("document.getElementById('question').textContent.includes('keeps')")
    tab.click('#tie')
    tab.keyboard.press('1')
    tab.keyboard.press('Shift+Digit3')
    tab.keyboard.press('Enter')
    tab.wait_for_function("document.getElementById('question').textContent.includes('effect')")
    tab.keyboard.press('Backspace')
    assert 'keeps' in tab.inner_text('#question')
    assert tab.locator('.result[aria-pressed=true]').count() == 2
    tab.keyboard.press('Enter')
    tab.keyboard.press('0')
    tab.wait_for_function("document.getElementById('count').textContent.startsWith('2 ')")
    first = saved(tab, '#save')
    assert [len(v['chosen']) for v in first] == [1, 2, 0] and len({v['case'] for v in first}) == 1
    assert first[0]['chosen'] == [first[0]['shown'][1]]
    for _ in range(25 * 3):
        seen = tab.inner_text('#count') + tab.inner_text('#question')
        tab.keyboard.press('1')
        tab.wait_for_function(
            "s => !document.getElementById('end').hidden || document.getElementById('count').innerText + "
            "document.getElementById('question').innerText !== s",
            arg=seen,
        )
    tab.wait_for_selector('#end:not([hidden])')
    lines = saved(tab, '#download')
    assert len(lines) == 26 * 3 and sum(v['pass'] == 2 for v in lines) == 6 and not errors
    file = _written(tmp_path / 'v.jsonl', '\n'.join(map(json.dumps, lines)))
    found = study.score(study.read_votes([file], key), key)
    assert found['raters'] == 1 and found['again']['n'] == 6
    orders = [tuple(key['cases'][v['case']]['results'][w] for w in v['shown']) for v in lines[::3]]
    assert len(set(orders)) > 8  # pictures are shuffled anew for every case


@pytest.mark.slow
def test_a_closed_page_goes_on_and_two_people_see_other_orders(browser, made):
    page, _ = made
    tab, errors = opened(browser, page, 1400)
    start(tab, 'Ben')
    for _ in range(4):
        question = tab.inner_text('#question')
        tab.click('.result >> nth=0')
        tab.wait_for_function("q => document.getElementById('question').textContent !== q", arg=question)
    where, effect, source = tab.inner_text('#count'), tab.inner_text('#effect'), tab.get_attribute('#source', 'src')
    tab.reload()
    assert 'Ben' in tab.inner_text('#resume') and tab.input_value('#rater') == 'Ben'
    start(tab, 'Ben')
    assert (tab.inner_text('#count'), tab.inner_text('#effect')) == (where, effect)
    assert tab.get_attribute('#source', 'src') == source and len(saved(tab, '#save')) == 4
    order = tab.evaluate('tasks.map(t => t.case.id).join()')
    tab.reload()
    start(tab, 'Cem')
    assert tab.evaluate('tasks.map(t => t.case.id).join()') != order and saved(tab, '#save') == [] and not errors


@pytest.mark.slow
def test_without_storage_it_works_and_warns(browser, made):
    page, _ = made
    tab, errors = opened(browser, page, 400)
    tab.add_init_script("Object.defineProperty(window, 'localStorage', {get() { throw new Error('blocked') }})")
    tab.reload()
    start(tab, 'Dan')
    tab.click('#letters button >> nth=2')
    tab.wait_for_function("document.getElementById('question').textContent.includes('keeps')")
    assert len(saved(tab, '#save')) == 1 and not errors
    assert tab.is_visible('#unsaved')


@pytest.mark.slow
def test_the_original_shows_while_it_is_held(browser, made):
    tab, errors = opened(browser, made[0], 1400)
    start(tab, 'Eva')
    src = lambda: tab.get_attribute('.result img', 'src')
    before, source = src(), tab.get_attribute('#source', 'src')
    tab.keyboard.down('Space')
    assert src() == source
    tab.keyboard.up('Space')
    assert src() == before and before != source and not errors
