"The report is self-contained, complete, escaped, deterministic, and its words follow from its numbers."

import base64
import html
import io
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from collectionlora import core
from collectionlora.core import run_info, UserError
from collectionlora.judge import columns, report as R, tables
from collectionlora.judge.gate import COLUMNS, Metric, METRICS, NONE, read_rows, Row

OWN, OTHER = 'ours, 8 steps', 'other <8> steps'
EFFECTS = {
    'hat': dict(category='animal', description='a <b>tall</b> hat & feather'),
    'rain': dict(category='animal', description='rain'),
}


def rows(method, good, nfe=8):
    return [
        Row(method, e, 'animal', f'i{i}', 0, e if i < good else NONE, i < good, 0.9, 0.05, 1.0, 0.2, nfe)
        for e in EFFECTS
        for i in range(6)
    ]


@pytest.fixture
def everything():
    record = dict(
        run_info(dict(steps=3, note='<script>'), 7, {'base': 'f' * 64}),
        cost=dict(seconds=75.0),
        metrics=dict(
            history=[
                {'step': s, 'loss_fake': 1.0 / (s + 1), 'loss_match': 0.5, 'norm': 2.0, 'seconds': 1.0}
                for s in range(9)
            ]
        ),
    )
    every = rows(OWN, 6) + rows(OTHER, 2) + rows(tables.COPY, 0) + rows(tables.CEILING, 6) + rows(tables.FLOOR, 0)
    columns = ['source', OWN, OTHER]
    pictures = {(e, 'i0', c): np.full((64, 64, 3), 10 * k, np.uint8) for k, e in enumerate(EFFECTS) for c in columns}
    return dict(
        title='T',
        lead='L',
        budget=R.budget_words(2, 100, 8, 0.5, 50, full_steps=1000),
        own=OWN,
        rows=every,
        effects=EFFECTS,
        records={'distill/collection': record},
        sizes={OWN: 1234},
        pictures=pictures,
        columns=columns,
        notes=['a note'],
    )


class Strict(HTMLParser):
    "Collects every tag and whatever could leave the page."

    def __init__(self):
        super().__init__()
        self.tags, self.links = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [v for k, v in attrs if k in ('src', 'href', 'srcset', 'data', 'action') and v]


def test_page_needs_nothing_from_outside(everything, tmp_path):
    page = R.render(tmp_path / 'report.html', **everything)
    found = Strict()
    found.feed(page)
    assert found.links and all(v.startswith('data:image/') for v in found.links)
    assert not {'script', 'link', 'iframe', 'object'} & set(found.tags) and 'url(' not in page and '@import' not in page
    assert (
        list(tmp_path.iterdir()) == [tmp_path / 'report.html']
        and (tmp_path / 'report.html').read_text(encoding='utf-8') == page
    )


def test_page_holds_what_was_asked(everything, tmp_path):
    page = R.render(tmp_path / 'r.html', **everything)
    for text in (
        OWN,
        'other &lt;8&gt; steps',
        *tables.REFERENCES[:2],
        'A short budget run',
        '1.2 kB',
        'f' * 64,
        '75 s',
        'prefers-color-scheme:dark',
        'image-rendering:pixelated',
        'a note',
        'n = 12',
    ):
        assert text in page, text
    assert page.count('class="heat"') == 2 and page.count('<svg') == 2 and page.count('<img') == 6
    assert '<b>tall' not in page and '&lt;script&gt;' in page


def test_same_input_same_bytes(everything, tmp_path):
    assert R.render(tmp_path / 'a.html', **everything) == R.render(tmp_path / 'b.html', **everything)


def test_report_without_floor_and_ceiling_is_refused(everything, tmp_path):
    everything['rows'] = rows(OWN, 6)
    with pytest.raises(UserError, match='floor and ceiling'):
        R.render(tmp_path / 'r.html', **everything)
    assert not list(tmp_path.iterdir())


def test_unknown_methods_are_refused(everything, tmp_path):
    with pytest.raises(UserError, match="did you mean 'ours, 8 steps'"):
        R.render(tmp_path / 'r.html', **{**everything, 'own': 'ours, 9 steps'})
    with pytest.raises(UserError, match='file sizes'):
        R.render(tmp_path / 'r.html', **{**everything, 'sizes': {'our': 3}})


def test_budget_words_follow_the_settings():
    short, full = R.budget_words(4, 300, 16, 0.5, 250, full_steps=3000), R.budget_words(50, 5000, 8, 0.5, 2000, seeds=3)
    assert (
        short.startswith('A short budget run')
        and '600 samples per effect' in short
        and '6% of' in short
        and 'demonstration' in short
    )
    assert (
        full.startswith('A run with the full number of generator steps')
        and '400 samples per effect' in full
        and '3 training seeds' in full
        and 'demonstration' not in full
    )


def test_verdict_follows_the_contrast():
    many = lambda m, good: [
        Row(m, f'e{e}', 'animal', f'i{i}', 0, f'e{e}' if i < good[e] else NONE, i < good[e], 1.0, 0.0, 1.0, 1.0, 8)
        for e in range(12)
        for i in range(10)
    ]
    a, b = many('a', [9, 10] * 6), many('b', [5, 7] * 6)
    [(c, p)] = tables.contrasts(a + b, 'a', ['b'])
    assert 'fewer bad cases than b' in R.verdict(c, p) and '-35 points [-38, -32]' in R.verdict(c, p)
    assert R.comparison(c) == dict(other='b', difference='-35', interval='-38 ... -32', said='better')
    [(c, p)] = tables.contrasts(a + b, 'b', ['a'])
    assert 'more bad cases than a' in R.verdict(c, p) and R.comparison(c)['said'] == 'worse'
    [(c, p)] = tables.contrasts(a + many('c', [10, 9] * 6), 'a', ['c'])
    assert R.verdict(c, p).startswith('No difference') and '80 % power' in R.verdict(c, p)
    said = lambda low, high: R.comparison(replace(c, low=low, high=high))['said']
    assert said(-0.05, 0.08) == 'as good, within 8 points' and said(-0.4, 0.3) == 'not decided'
    assert said(float('nan'), float('nan')) == 'one effect says nothing about others'


def test_small_pictures_are_lossless_and_large_ones_small():
    g = np.random.default_rng(0)
    small = g.integers(0, 255, (64, 64, 3), dtype=np.uint8)
    back = Image.open(io.BytesIO(base64.b64decode(R.image_uri(small).split(',')[1])))
    assert np.array_equal(np.asarray(back), small)
    big = Image.open(io.BytesIO(base64.b64decode(R.image_uri(Image.new('RGBA', (2048, 1024), 'red')).split(',')[1])))
    assert big.size == (512, 256)


def test_a_diverged_curve_has_a_gap():
    svg = R.line_chart({'loss': [(0, 1.0), (1, 2.0), (2, float('nan')), (3, 1.0), (4, 2.0)]}, 'loss <1>')
    line = re.search(r'<path d="(M[^"]*)" fill="none"', svg)[1]
    assert line.count('M') == 2 and 'nan' not in line and 'loss &lt;1&gt;' in svg
    with pytest.raises(UserError, match='no finite value'):
        R.line_chart({'loss': [(0, float('nan'))]}, 'loss')


@pytest.mark.parametrize('low, high', [(0, 1), (-3, 7), (1e-5, 3e-5), (0, 4321), (2, 2)])
def test_ticks_are_round_and_inside(low, high):
    t = R.ticks(low, high)
    assert 1 <= len(t) <= 7 and all(low - 1e-9 <= v <= high + 1e-9 for v in t)


def test_runs_of_one_experiment_share_a_chart():
    teachers = {
        f'teachers/{e}': dict(metrics=dict(loss=[1.0, 0.5, 0.2], sha256='f' * 64, ids=['a', 'b'])) for e in EFFECTS
    }
    [block] = R.charts_of(teachers)
    assert block['name'] == 'teachers' and len(block['svgs']) == 1 and all(e in block['svgs'][0] for e in EFFECTS)
    assert R.charts_of({'effects/run': dict(metrics=dict(general=8))}) == []


def test_report_without_an_oracle_says_so(everything, tmp_path):
    lines = [dict(method=OWN, effect=e, distance=0.5, floor=1.0, ceiling=0.4, n=3, seconds=0.2, nfe=8) for e in EFFECTS]
    page = R.render(
        tmp_path / 'r.html',
        **{**everything, 'rows': [], 'sizes': {}, 'distances': lines, 'no_oracle': 'There is no ground truth.'},
    )
    assert (
        'There is no ground truth.' in page
        and '0.400' in page
        and 'class="heat"' not in page
        and 'What the judge' not in page
        and page.count('<img') == 6
    )
    with pytest.raises((UserError, ValueError)):
        R.render(tmp_path / 'r2.html', **{**everything, 'rows': [], 'distances': lines})


def test_optional_reference_is_set_off_and_no_contestant(everything, tmp_path):
    everything['rows'] = everything['rows'] + rows(tables.ENCODED, 6)
    lines = R.main_table(everything['rows'], {})
    assert [l['reference'] for l in lines] == [False, False, True, True, True, True]
    page = R.render(tmp_path / 'r.html', **everything)
    assert page.count('class="heat"') == 2 and tables.ENCODED in page


def judged(method, good, effects=12, images=10):
    "Rows in which good(effect, image) says whether an edit succeeded."
    return [
        Row(method, f'e{e}', 'animal', f'i{i}', 0, f'e{e}' if ok else NONE, ok, 1.0, 0.0, 1.0, 1.0, 8)
        for e in range(effects)
        for i in range(images)
        for ok in [good(e, i)]
    ]


TEACHER = 'teacher, 40 steps × CFG'


@pytest.mark.parametrize(
    'ours, theirs, effects, verdict',
    [
        (lambda e, i: i < 5 + e % 2, lambda e, i: i < 9, 12, 'worse than the teachers by 35 points [32, 38].'),
        (lambda e, i: i < 9, lambda e, i: i < 5 + e % 2, 12, 'better than the teachers by 35 points [32, 38].'),
        (lambda e, i: i < 8 + e % 2, lambda e, i: i < 9 - e % 2, 12, 'as good as the teachers within 7 points.'),
        (lambda e, i: i < 10 * (e % 2), lambda e, i: i < 10 - 10 * (e % 2), 4, 'is not decided'),
        (lambda e, i: i < 9, lambda e, i: i < 8, 1, 'as good as the teacher of this effect: it may be up to'),
    ],
)
def test_the_first_sentence_follows_the_interval(ours, theirs, effects, verdict):
    rows = (
        judged(OWN, ours, effects) + judged('teacher alone, 8 steps', ours, effects) + judged(TEACHER, theirs, effects)
    )
    said, basis = R.headline(rows, OWN)
    assert verdict in said and said.count('.') == 1
    assert f'{10 * effects} edits with each' in basis and 'percentage points of failed edits' in basis


def test_the_first_sentence_without_teachers_or_rows():
    rows = judged(OWN, lambda e, i: i < 8)
    assert R.headline(rows, OWN) == ('20 % of the edits failed.', 'There are no teachers here to compare with.')
    assert R.headline([], OWN) == R.headline(rows, 'another') == ('', '')
    assert R.teachers_among(['base', 'teacher alone, 8 steps', TEACHER]) == TEACHER
    assert (
        R.teachers_among(['teacher alone, 8 steps']) == 'teacher alone, 8 steps' and R.teachers_among(['base']) is None
    )


def test_the_verdict_stands_before_the_pictures_and_ours_beside_source_and_target(everything, tmp_path):
    everything['rows'] += rows(TEACHER, 6)
    everything['columns'] = columns = ['source', 'target', OTHER, TEACHER, OWN]
    everything['pictures'] = {
        (e, 'i0', c): np.full((64, 64, 3), 10 * k, np.uint8) for k, e in enumerate(EFFECTS) for c in columns
    }
    page = R.render(tmp_path / 'r.html', **everything)
    assert page.index('class="verdict"') < page.index('class="budget"') < page.index('<img') < page.index('bad cases')
    for part in page.split('<div class="three">')[1:]:
        three, more = part.split('<div class="more">')
        assert re.findall(r'<figcaption>([^<]*)', three) == ['source', 'target', OWN]
        assert three.count('<figure class=own>') == 1 and more.split('</section>')[0].count('class=own') == 0
        assert re.findall(r'<figcaption>([^<]*)', more.split('<div class="edit">')[0]) == [
            'other &lt;8&gt; steps',
            TEACHER,
        ]
    assert page.index(f'<small>{OWN}</small>') < page.index(f'<small>{TEACHER}</small>')  # ours is the first tile


def test_only_the_effects_that_were_asked_about(everything, tmp_path):
    own = [r for r in everything['rows'] if r.method == OWN]
    other = [Row(**{**vars(r), 'predicted': 'rain', 'applied': False}) if r.effect == 'hat' else r for r in own]
    everything['rows'] = [r for r in everything['rows'] if r.method != OWN] + other
    page = R.render(tmp_path / 'r.html', **{**everything, 'effects': {'hat': EFFECTS['hat']}})
    gallery = page[page.index('never seen') : page.index('How often did it fail')]
    assert gallery.count('<h3>') == 1 and gallery.count('<img') == 3 and 'n = 6' in page and 'n = 12' not in page
    assert 'Bad cases by effect' in page and page.count('<tr><td>rain') == 0
    heat = page[page.rindex('class="heat"') :].split('</table>')[0]
    assert heat.count('<tr>') == 2 and 'asked hat, seen rain: 6 of 6' in heat  # what it was taken for has a column


def test_a_page_without_an_oracle_begins_with_distances(everything, tmp_path):
    lines = [
        dict(method=m, effect=e, distance=d, floor=1.0, ceiling=0.4, n=3, seconds=0.2, nfe=8)
        for m, far in ((OWN, (0.5, 1.5)), (OTHER, (0.1, 0.1)))
        for e, d in zip(EFFECTS, far)
    ]
    given = {**everything, 'rows': [], 'sizes': {}, 'distances': lines, 'no_oracle': 'No ground truth.'}
    page = R.render(tmp_path / 'r.html', **given)
    assert 'nearer to the effect than the unedited pictures, for 1 of 2 effects.' in page
    one = R.render(tmp_path / 'one.html', **{**given, 'effects': {'hat': EFFECTS['hat']}})
    assert 'for 1 of 1 effect.' in one and one.count('<td>rain') == 0 and one.count('<img') == 3
    silent = [{**d, 'ceiling': 2.0} for d in lines]
    assert 'class="verdict"' not in R.render(tmp_path / 's.html', **{**given, 'distances': silent})


def test_a_further_metric_is_a_column_of_the_table(everything, tmp_path, monkeypatch):
    monkeypatch.setitem(METRICS, 'drift', Metric('colour drift', 'from the source', lambda item, out, found: 0.0, 3))
    everything['rows'] = [replace(r, more={'drift': 0.125}) if r.method == OWN else r for r in everything['rows']]
    page = R.render(tmp_path / 'r.html', **everything)
    assert '<th title="from the source">colour drift' in page and '<td>0.125' in page
    assert tables.summary([r for r in everything['rows'] if r.method == OWN])['drift'].value == 0.125


def test_rows_of_runs_that_were_kept_before_the_columns_are_still_shown(tmp_path):
    kept = core.results_dir() / 'main_job' / 'demo'
    rows_kept, found = read_rows(kept / 'evaluation.rows.jsonl'), core.read_json(kept / 'evaluation.json')['metrics']
    old = [replace(r, more={k: v for k, v in r.more.items() if k not in COLUMNS}) for r in rows_kept]
    about = (found['own'], old, found['effects'], {}, found['sizes'], {}, ['source'])
    page = R.render(tmp_path / 'r.html', 'title', 'lead', 'budget', *about)
    assert found['own'] in page and 'CLIP-I' not in page and columns.as_markdown(old) == []
    assert columns.paper_contrasts(old, found['own'], [m for m in found['methods'] if m != found['own']]) == []


def test_lines_of_style_and_template_can_be_read():
    from collectionlora.judge.page import PAGE, STYLE

    assert max(map(len, (STYLE + PAGE).splitlines())) <= 120 and 'http' not in STYLE
    assert STYLE.count('{') == STYLE.count('}') and PAGE.count('<section>') == PAGE.count('</section>')


def test_an_evaluation_asks_about_the_folders_that_are_given(tmp_path):
    from collectionlora.core import collection_dir
    from collectionlora.files.drawn import write_world_effect
    from collectionlora.judge.evaluate import asked_about, recognisable
    from collectionlora.use.edit import CollectionFile

    file = CollectionFile(collection_dir() / 'collection.safetensors')
    lava, pixels = (write_world_effect(tmp_path / id, id, 1, 0) for id in ('lava_creature', 'pixel_art'))
    assert list(asked_about(file)) == list(file.catalogue) == recognisable(file)
    told = asked_about(file, [lava])
    assert list(told) == ['lava_creature'] and set(told['lava_creature']) == {'category', 'description'}
    with pytest.raises(UserError, match="no effect 'pixel_art' in this collection"):
        asked_about(file, [lava, pixels])


def test_the_sample_report_says_what_the_kept_records_say():
    "tools/sample_report.py makes it again; where records change and it does not, this fails."
    demo, page = core.repo_root() / 'results/main_job/demo', core.repo_root() / 'assets/report.html'
    found = core.read_json(demo / 'evaluation.json')['metrics']
    verdict, counted = R.headline(R.asked_rows(read_rows(demo / found['rows']), found['effects']), found['own'])
    text = html.unescape(page.read_text(encoding='utf-8'))
    assert verdict in text and counted in text and all(name in text for name in found['sizes'])
    assert text.count('data:image/jpeg') == 9 * len(found['effects']) and page.stat().st_size < 400_000


def test_a_mark_is_that_of_the_picture_shown():
    "Pictures are of the first noise and the first evaluation, whatever the others were judged."
    first = rows(OWN, 6)[0]
    other = replace(first, predicted=NONE, applied=False)
    pictures = {('hat', 'i0', OWN): np.zeros((8, 8, 3), np.uint8)}
    for judged in ([first, replace(other, seed=1)], [replace(first, run='a'), replace(other, run='b')]):
        [line] = R.gallery({'hat': EFFECTS['hat']}, pictures, judged, [OWN], [('hat', 'i0')])[0]['lines']
        assert '✓' in line[0]['mark']
