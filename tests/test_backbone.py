import copy
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.testing._internal.two_tensor import TwoTensor

from conftest import NO_TORCHVISION
from collectionlora import flow
from collectionlora.bases import frugal, pipeline
from collectionlora.bases.backbone import Backbone, Cond
from collectionlora.bases.fewer_bits import BY_LIBRARY
from collectionlora.bases.frugal import held_by, held_bytes
from collectionlora.bases.pipeline import few_step_scheduler, fix_mm_token_type_ids, load_base, plain_noise, use_areas
from collectionlora.bases.slots import adapted_sizes, hash_weights
from collectionlora.bases.tiny import tiny_base
from collectionlora.core import nano_dir, read_json, rng, sha256_folder, UserError, write_json
from collectionlora.engine.plan import kept_bytes
from collectionlora.files.dialects import Lora
from collectionlora.files.lora import write_lora
from collectionlora.world.draw import draw_scene, render

GRIDS = ((8, 8), (8, 8))
ROLES = ('student', 'fake', 'teacher')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return tiny_base(tmp_path_factory.mktemp('tiny'))


@pytest.fixture(scope='module')
def base(folder):
    return load_base(folder)


@pytest.fixture
def fresh(base):
    "A backbone of its own: the tiny transformer's weights, no roles."
    from diffusers import QwenImageTransformer2DModel

    return Backbone(QwenImageTransformer2DModel.from_pretrained(base.folder / 'transformer'))


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(B=2, L=9, seed=0):
    cond = Cond(normal(B, 64, 16, seed=seed), normal(B, L, 16, seed=seed + 1), None, GRIDS)
    return normal(B, 64, 16, seed=seed + 2), torch.linspace(0.2, 0.9, B), cond


def random_lora(modules, rank, seed=0, scale=0.2):
    return Lora(
        {
            n: (normal(rank, i, seed=seed + k) * scale, normal(o, rank, seed=seed - k) * scale)
            for k, (n, (i, o)) in enumerate(modules.items())
        }
    )


def with_roles(backbone, roles=ROLES, rank=4):
    for k, r in enumerate(roles):
        backbone.add_role(r, rank, seed=k)
        backbone.load(r, random_lora(backbone.modules(), rank, seed=1000 * (k + 1)))
    return backbone


def photo(seed, size=(64, 64)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))


# --- conditions


def test_conds_join_pad_index_and_repeat():
    _, _, a = inputs(2, L=9)
    _, _, b = inputs(1, L=5, seed=9)
    both = Cond.cat([a, b])
    assert len(both) == 3 and both.mask.dtype == torch.bool and both.mask.sum(1).tolist() == [9, 9, 5]
    assert torch.equal(both.emb[2, :5], b.emb[0]) and both.emb[2, 5:].abs().sum() == 0
    assert both.index([0, 1]).mask is None
    alone = both.index([2])
    assert alone.mask is None and torch.equal(alone.emb, b.emb) and torch.equal(alone.source, b.source)
    assert Cond.cat([both, both]).mask.shape == (6, 9) and Cond.cat([a, a]).mask is None
    assert torch.equal(both.repeat(2).index(slice(3, 6)).emb, both.emb)
    assert both.to(torch.float64).emb.dtype == torch.float64 and both.to(torch.float64).mask.dtype == torch.bool
    with pytest.raises(UserError, match='shape buckets'):
        Cond.cat([a, Cond(b.source, b.emb, None, ((4, 16), (8, 8)))])
    with pytest.raises(UserError, match='empty'):
        Cond.cat([])


def test_padding_changes_nothing(fresh):
    x, t, a = inputs(1, L=5)
    _, _, b = inputs(1, L=17, seed=5)
    both = Cond.cat([a, b])
    v = fresh.velocity('base', torch.cat([x, x]), torch.cat([t, t]), both)
    torch.testing.assert_close(v[:1], fresh.velocity('base', x, t, a), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(v[1:], fresh.velocity('base', x, t, b), atol=1e-5, rtol=1e-5)


def test_velocity_refuses_what_does_not_fit(fresh):
    x, t, cond = inputs()
    for bad in ((x[:, :63], t, cond), (x, t[:1], cond), (x[:1], t, cond)):
        with pytest.raises(UserError, match='do not fit'):
            fresh.velocity('base', *bad)
    with pytest.raises(UserError, match='divide timesteps by 1000'):
        fresh.velocity('base', x, 1000 * t, cond)
    with pytest.raises(UserError, match='source tokens'):
        fresh.velocity('base', x, t, Cond(cond.source[:, 1:], cond.emb, None, GRIDS))
    fresh.add_role('student', 2)
    with pytest.raises(UserError, match="'studnet' is not on this backbone; did you mean 'student'"):
        fresh.velocity('studnet', x, t, cond)


# --- roles


def losses(score, grad_params, x, t, cond):
    "One DMD-shaped step: rollout, scores of three roles, the student's and the fake score's losses; their gradients."
    with torch.no_grad():
        x_t = flow.sample_few(lambda x, t: score('student', x, t), x, [1.0, 0.9], lambda i: normal(*x.shape, seed=70))
    v = score('student', x_t, t)
    x0 = flow.to_x0(x_t, v, t)
    with torch.no_grad():
        noisy = flow.add_noise(x0, normal(*x.shape, seed=71), t)
        v_fake, v_real, v_base = (score(r, noisy, t) for r in ('fake', 'teacher', 'base'))
    dmd = 0.5 * (v - (v - (v_fake - v_real) + 0.1 * v_base).detach()).square().mean()
    return dmd, (score('fake', noisy, t) - (noisy - x)).square().mean()


def three_copies(folder, loras, checkpointing):
    "Plain diffusers and PEFT, nothing of ours: one deep copy of the base per role."
    from diffusers import QwenImageTransformer2DModel
    from peft import LoraConfig

    one = QwenImageTransformer2DModel.from_pretrained(folder / 'transformer').requires_grad_(False).eval()
    copies = {'base': one}
    for role, lora in loras.items():
        m = copies[role] = copy.deepcopy(one)
        m.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=list(lora.factors)), adapter_name=role)
        with torch.no_grad():
            for n, (A, B) in lora.factors.items():
                layer = m.get_submodule(n)
                layer.lora_A[role].weight.copy_(A)
                layer.lora_B[role].weight.copy_(B)
        if checkpointing:
            m.enable_gradient_checkpointing()
    return copies


@pytest.mark.parametrize('checkpointing', [False, True])
@pytest.mark.parametrize('at_backward', ['as left', 'base', 'teacher', ('fake', 'teacher')])
def test_one_base_equals_three_copies_bit_for_bit(fresh, folder, checkpointing, at_backward):
    x, t, cond = inputs()
    with_roles(fresh)
    fresh.checkpointing(checkpointing)
    copies = three_copies(folder, {r: fresh.lora(r) for r in ROLES}, checkpointing)

    def of_copies(role, x, t):
        return copies[role](
            hidden_states=torch.cat([x, cond.source], 1),
            timestep=t,
            encoder_hidden_states=cond.emb,
            img_shapes=[[(1, 8, 8)] * 2] * 2,
            return_dict=False,
        )[0][:, :64]

    ours = losses(lambda r, x, t: fresh.velocity(r, x, t, cond), None, x, t, cond)
    theirs = losses(of_copies, None, x, t, cond)
    if at_backward == 'as left':
        sum(ours).backward()
    else:
        with fresh.using(at_backward):
            sum(ours).backward()
    sum(theirs).backward()
    assert [a.item() for a in ours] == [b.item() for b in theirs]
    for role in ('student', 'fake'):
        norm = 0
        for n in fresh.modules():
            a, b = fresh.transformer.get_submodule(n), copies[role].get_submodule(n)
            for f in ('lora_A', 'lora_B'):
                p, q = getattr(a, f)[role].weight.grad, getattr(b, f)[role].weight.grad
                assert (p is None) == (q is None), n
                if p is not None:
                    assert torch.equal(p, q), (n, f, (p - q).abs().max())
                    norm += p.norm().item()
        assert norm > 1e-3, role
    assert all(p.grad is None for p in fresh.parameters('teacher'))
    assert all(p.grad is None for n, p in fresh.transformer.named_parameters() if 'lora_' not in n)


def test_the_papers_trap_is_real_without_us(folder, fresh):
    "With PEFT's own switching, the same program gives no gradient and no error: the reason for the test above."
    from peft import LoraConfig

    x, t, cond = inputs()
    m = fresh.transformer
    for r in ('student', 'teacher'):
        m.add_adapter(LoraConfig(r=4, target_modules=['to_q', 'to_v'], init_lora_weights=False), adapter_name=r)
    run = lambda: m(
        hidden_states=torch.cat([x, cond.source], 1),
        timestep=t,
        encoder_hidden_states=cond.emb,
        img_shapes=[[(1, 8, 8)] * 2] * 2,
        return_dict=False,
    )[0]
    m.set_adapter('student')
    out = run()
    m.set_adapter('teacher')
    out.sum().backward()
    assert not any(p.grad is not None and p.grad.abs().sum() > 0 for n, p in m.named_parameters() if '.student.' in n)


def test_switching_restores_and_keeps_requires_grad(fresh):
    with_roles(fresh)

    def state():
        return fresh._active[:], dict(fresh._scaling), [p.requires_grad for p in fresh.transformer.parameters()]

    idle = state()
    with fresh.using('student'):
        outer = state()
        with pytest.raises(RuntimeError, match='inside'):
            with fresh.using({'fake': 0.3, 'teacher': 2.0}):
                raise RuntimeError('inside')
        assert state() == outer
    assert state() == idle and idle[0] == []
    assert all(p.requires_grad for r in ROLES for p in fresh.parameters(r))
    assert not any(p.requires_grad for n, p in fresh.transformer.named_parameters() if 'lora_' not in n)


def test_base_role_is_the_untouched_base(base, fresh):
    x, t, cond = inputs()
    bare = fresh.velocity('base', x, t, cond)
    before = hash_weights(fresh.transformer)
    with_roles(fresh)
    assert torch.equal(bare, fresh.velocity('base', x, t, cond))
    assert not torch.allclose(bare, fresh.velocity('student', x, t, cond), atol=1e-2)
    assert hash_weights(fresh.transformer) == before == fresh.hash
    fresh.remove('fake')
    assert list(fresh.roles) == ['student', 'teacher'] and not any(
        '.fake.' in n for n, _ in fresh.transformer.named_parameters()
    )
    assert torch.equal(bare, fresh.velocity('base', x, t, cond))
    fresh.add_role('fake', 2)
    assert torch.equal(fresh.velocity('fake', x, t, cond), bare)  # B = 0
    with pytest.raises(UserError, match="'critic'"):
        fresh.remove('critic')


def weights_plus(backbone, parts):
    "A deep copy of the bare base with the given weighted deltas added to its weights."
    from diffusers import QwenImageTransformer2DModel

    m = QwenImageTransformer2DModel.from_config(backbone.transformer.config).eval()
    m.load_state_dict(
        {k.replace('.base_layer', ''): v for k, v in backbone.transformer.state_dict().items() if '.lora_' not in k}
    )
    with torch.no_grad():
        for role, w in parts.items():
            for n, (A, B) in backbone.lora(role).factors.items():
                m.get_submodule(n).weight.add_(w * B @ A)
    return Backbone(m)


@pytest.mark.parametrize(
    'role, parts',
    [
        ('student', {'student': 1}),
        (('fake', 'teacher'), {'fake': 1, 'teacher': 1}),
        ({'student': 0.5, 'teacher': -2.0}, {'student': 0.5, 'teacher': -2.0}),
    ],
)
def test_stacked_roles_are_the_sum_of_their_deltas(fresh, role, parts):
    x, t, cond = inputs()
    with_roles(fresh)
    expected = weights_plus(fresh, parts).velocity('base', x, t, cond)
    with torch.no_grad():
        v = fresh.velocity(role, x, t, cond)
        torch.testing.assert_close(v, expected, atol=2e-5, rtol=1e-4)
        before = {n: p.clone() for n, p in fresh.transformer.named_parameters()}
        with fresh.merged(role):
            torch.testing.assert_close(fresh.velocity(role, x, t, cond), v, atol=2e-5, rtol=1e-4)
        assert all(torch.equal(before[n], p) for n, p in fresh.transformer.named_parameters())
        assert torch.equal(fresh.velocity(role, x, t, cond), v)


def test_a_merged_role_refuses_others_and_gradient(fresh):
    x, t, cond = inputs()
    with_roles(fresh)
    bare = fresh.velocity('base', x, t, cond)
    with fresh.merged('student'):
        with pytest.raises(UserError, match='only that role'), torch.no_grad():
            fresh.velocity('teacher', x, t, cond)
        with pytest.raises(UserError, match='without gradient'):
            fresh.velocity('student', x, t, cond)
        with pytest.raises(UserError, match='leave the first'), fresh.merged('fake'):
            pass
    assert torch.equal(bare, fresh.velocity('base', x, t, cond))


def test_new_roles_depend_on_seed_and_module_alone(base, folder):
    from diffusers import QwenImageTransformer2DModel

    def made(order, junk):
        torch.manual_seed(junk)
        b = Backbone(QwenImageTransformer2DModel.from_pretrained(folder / 'transformer'))
        before = torch.get_rng_state()
        for name, seed in order:
            b.add_role(name, 4, seed=seed)
        assert torch.equal(before, torch.get_rng_state())
        return b

    one, two = made([('a', 5), ('b', 6)], 1), made([('b', 6), ('c', 5)], 2)
    for p, q in zip(one.parameters('a'), two.parameters('c')):
        assert torch.equal(p, q)
    for p, q in zip(one.parameters('b'), two.parameters('b')):
        assert torch.equal(p, q)
    A, B = one.parameters('a')[:2]
    assert B.abs().sum() == 0 and 0.2 < A.std() < 0.3  # 1/rank
    assert not torch.equal(A, one.parameters('b')[0])
    for bad in (
        dict(name='base', rank=1),
        dict(name='a', rank=1),
        dict(name='x.y', rank=1),
        dict(name='z', rank=0),
        dict(name='z', rank=1, targets=['attn.to_Q']),
    ):
        with pytest.raises(UserError):
            one.add_role(**bad)
    one.add_role('few', 2, targets=['attn.to_q'])
    assert {n.split('.', 2)[-1] for n in one.lora('few').factors} == {'attn.to_q'}


def test_alpha_is_folded(fresh):
    x, t, cond = inputs()
    fresh.add_role('plain', 4)
    fresh.add_role('strong', 8, alpha=16)
    lora = random_lora(fresh.modules(), 4)
    fresh.load('plain', lora)
    fresh.load('strong', lora)
    torch.testing.assert_close(
        fresh.velocity('plain', x, t, cond), fresh.velocity('strong', x, t, cond), atol=1e-5, rtol=1e-5
    )
    for n, (A, B) in fresh.lora('strong').factors.items():
        torch.testing.assert_close(B @ A, lora.factors[n][1] @ lora.factors[n][0])


def test_loading_leaves_nothing_of_the_one_before(fresh):
    x, t, cond = inputs()
    names = list(fresh.modules())
    fresh.add_role('teacher', 8)
    full = random_lora(fresh.modules(), 8)
    part = Lora({n: (A[:3], B[:, :3]) for n, (A, B) in full.factors.items() if n != names[3]})
    fresh.load('teacher', full)
    pointer = fresh.parameters('teacher')[0].data_ptr()
    fresh.load('teacher', part)
    assert fresh.parameters('teacher')[0].data_ptr() == pointer == fresh.flat('teacher').data_ptr()
    back = fresh.lora('teacher').factors
    assert all(f.abs().sum() == 0 for f in back[names[3]])
    for n, (A, B) in part.factors.items():
        assert torch.equal(back[n][0][:3], A) and torch.equal(back[n][1][:, :3], B)
        assert back[n][0][3:].abs().sum() == 0 and back[n][1][:, 3:].abs().sum() == 0
    fresh.add_role('exact', 3)
    fresh.load('exact', part)
    torch.testing.assert_close(
        fresh.velocity('teacher', x, t, cond), fresh.velocity('exact', x, t, cond), atol=1e-5, rtol=1e-5
    )


def test_loading_under_a_waiting_backward_is_an_error(fresh):
    x, t, cond = inputs()
    with_roles(fresh)
    loss = fresh.velocity('student', x, t, cond).square().mean()
    fresh.load('fake', fresh.lora('teacher'))
    loss.backward(retain_graph=True)
    fresh.load('student', fresh.lora('teacher'))
    with pytest.raises(RuntimeError, match='modified by an inplace operation'):
        loss.backward()


def test_loading_refuses_what_does_not_fit_and_changes_nothing(fresh):
    fresh.add_role('teacher', 4)
    good = random_lora(fresh.modules(), 4)
    fresh.load('teacher', good)
    before = fresh.flat('teacher').clone()
    n = next(iter(good.factors))
    A, B = good.factors[n]
    broken = {
        'did you mean': {**good.factors, n.replace('.1', '.11'): (A, B)},
        'rank 5 but the role 4': {**good.factors, n: (torch.zeros(5, A.shape[1]), torch.zeros(B.shape[0], 5))},
        'NaN': {**good.factors, n: (A, B * float('nan'))},
        'the module wants': {**good.factors, n: (A[:, 1:], B)},
        r'A \(4, 48\)': {**good.factors, n: (A, B[:, :3])},
    }
    for message, factors in broken.items():
        with pytest.raises(UserError, match=message):
            fresh.load('teacher', Lora(factors))
        assert torch.equal(fresh.flat('teacher'), before)


def test_training_moves_only_its_role_and_its_flat_view(fresh):
    x, t, cond = inputs()
    with_roles(fresh)
    before = {r: fresh.flat(r).clone() for r in ROLES}
    base_hash = hash_weights(fresh.transformer)
    opt = torch.optim.AdamW(fresh.parameters('student'), lr=1e-2)
    first = None
    for _ in range(5):
        loss = (fresh.velocity('student', x, t, cond) - x).square().mean()
        first = first or loss.item()
        opt.zero_grad()
        loss.backward()
        opt.step()
    assert loss.item() < first
    assert not torch.equal(fresh.flat('student'), before['student'])
    assert torch.equal(fresh.flat('fake'), before['fake']) and torch.equal(fresh.flat('teacher'), before['teacher'])
    assert hash_weights(fresh.transformer) == base_hash


def test_half_precision_keeps_fp32_masters(folder):
    from diffusers import QwenImageTransformer2DModel

    b = Backbone(QwenImageTransformer2DModel.from_pretrained(folder / 'transformer'), dtype=torch.bfloat16)
    x, t, cond = inputs()
    bare = b.velocity('base', x, t, cond)
    with_roles(b, ('student',))
    seen = []
    b.transformer.transformer_blocks[0].attn.to_q.lora_A['student'].register_forward_hook(
        lambda m, a, o: seen.append((a[0].dtype, o.dtype))
    )
    v = b.velocity('student', x, t, cond)
    v.square().mean().backward()
    assert seen == [(torch.bfloat16, torch.bfloat16)] and v.dtype == torch.float32
    assert all(p.dtype == torch.float32 for p in b.parameters('student'))
    assert sum(p.grad.norm() for p in b.parameters('student') if p.grad is not None) > 0
    assert torch.equal(b.velocity('base', x, t, cond), bare)


def test_guided_is_both_branches(fresh):
    x, t, cond = inputs(L=9)
    _, _, uncond = inputs(L=4, seed=8)
    v, u = fresh.velocity('base', x, t, cond), fresh.velocity('base', x, t, uncond)
    for rescale in (False, True):
        torch.testing.assert_close(
            fresh.guided('base', x, t, cond, uncond, 4.0, rescale), flow.guide(v, u, 4.0, rescale), atol=1e-4, rtol=1e-4
        )
    assert torch.equal(fresh.guided('base', x, t, cond, uncond, 1.0), v)


# --- the pipeline folder


def test_encoders_equal_the_stock_pipeline_one_by_one(base):
    images = [photo(i, s) for i, s in enumerate([(64, 64), (100, 100), (32, 32), (64, 64)])]
    prompts = ['make the cat red', 'in the style of a cat, with a much longer instruction', ' ', 'swap']
    emb, mask = base.encode_prompts(images, prompts)
    latents = base.encode_images(images)
    for i, (im, p) in enumerate(zip(images, prompts)):
        seen = base.pipe.image_processor.resize(im, 64, 64)
        e, m = base.pipe.encode_prompt(p, [seen])
        assert m is None and int(mask[i].sum()) == e.shape[1] and bool(mask[i, : e.shape[1]].all())
        assert (emb[i, : e.shape[1]] - e[0]).abs().max() < 1e-5
        z = base.pipe._encode_vae_image(base.pipe.image_processor.preprocess(im, 64, 64).unsqueeze(2), None)
        assert (base.pipe._pack_latents(z, 1, 4, 16, 16)[0] - latents[i]).abs().max() < 1e-5
    assert not torch.allclose(emb[0, :15], emb[3, :15])


def test_two_sources_and_odd_shapes(base):
    rows = [[photo(1), photo(2, (128, 64))], [photo(3), photo(4, (128, 64))]]
    cond = base.cond(rows, ['a', 'make the cat'])
    assert cond.grids == ((4, 12), (8, 8), (4, 12)) and cond.source.shape == (2, 64 + 48, 16)
    e, _ = base.pipe.encode_prompt(
        'a', [base.pipe.image_processor.resize(im, *base.size(im, 64 * 64)) for im in rows[0]]
    )
    assert (cond.index([0]).emb - e).abs().max() < 1e-5
    assert base.backbone.velocity('base', normal(2, 48, 16), torch.tensor([0.1, 0.9]), cond).shape == (2, 48, 16)
    with pytest.raises(UserError, match='shape buckets'):
        base.cond([photo(1), photo(2, (128, 64))], ['a', 'b'])
    with pytest.raises(UserError, match='2 images and 1 prompts'):
        base.encode_prompts([photo(1), photo(2)], ['a'])
    with pytest.raises(UserError, match='empty'):
        base.cond([], [])
    with pytest.raises(UserError, match='reserved word'):
        base.cond([photo(1)], ['a <|image_pad|> b'])
    with pytest.raises(UserError, match='tokens; shorten it to 3,000 or less'):
        base.encode_prompts([photo(1)], ['a quiet harbour ' * 600])


def test_many_step_sampler_equals_the_stock_pipeline(base):
    im, n, grid = photo(5), 6, (8, 8)
    cond, uncond = base.cond([im], ['make the cat red']), base.uncond([im])
    x1 = flow.noise_like((1, 64, 16), [3])
    v = lambda x, t: base.backbone.guided('base', x, t, cond, uncond, 4.0, rescale=True)
    with torch.no_grad():
        ours = base.decode(flow.sample_ode(v, x1, base.times(n, grid)), grid, 'np')
    theirs = base.pipe(
        im,
        'make the cat red',
        ' ',
        true_cfg_scale=4.0,
        height=64,
        width=64,
        num_inference_steps=n,
        latents=x1,
        output_type='np',
    ).images
    assert ours.shape == theirs.shape == (1, 64, 64, 3) and ours.std() > 1e-3
    assert np.abs(ours - theirs).max() < 1e-5


def test_a_plain_pipeline_with_our_scheduler_and_lora_file_gives_our_image(base, folder, tmp_path):
    from diffusers import QwenImageEditPlusPipeline

    fresh = load_base(folder)
    lora = random_lora(fresh.backbone.modules(), 4)
    fresh.backbone.add_role('student', 4)
    fresh.backbone.load('student', lora)
    im, times, grid = photo(6), flow.few_step_times(8, 3), (8, 8)
    cond, noise = fresh.cond([im], ['make the cat red']), plain_noise(11, grid, 16)
    state = torch.get_rng_state()
    with torch.no_grad():
        ours = fresh.decode(
            flow.sample_few(lambda x, t: fresh.backbone.velocity('student', x, t, cond), noise(0), times, noise),
            grid,
            'np',
        )
    assert torch.equal(state, torch.get_rng_state())
    write_lora(tmp_path / 'student.safetensors', lora, {})
    pipe = QwenImageEditPlusPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    fix_mm_token_type_ids(pipe.text_encoder)
    use_areas(folder)
    pipe.scheduler, sigmas = few_step_scheduler(times)
    run = lambda: (
        pipe(
            im,
            'make the cat red',
            true_cfg_scale=1.0,
            height=64,
            width=64,
            sigmas=sigmas,
            num_inference_steps=len(sigmas),
            output_type='np',
        ).images
    )
    torch.manual_seed(11)
    without = run()
    pipe.load_lora_weights(str(tmp_path), weight_name='student.safetensors')
    torch.manual_seed(11)
    plain = run()
    assert np.abs(ours - plain).max() < 1e-5
    assert np.abs(without - plain).max() > 1e-3


def test_token_types_matter_and_the_fix_is_idempotent(folder):
    base = load_base(folder)
    ids = base.pipe.processor(
        text=['<|vision_start|><|image_pad|><|vision_end|> cat'], images=[photo(1, (56, 56))], return_tensors='pt'
    )
    call = lambda enc: enc(
        input_ids=ids['input_ids'],
        pixel_values=ids['pixel_values'],
        image_grid_thw=ids['image_grid_thw'],
        output_hidden_states=True,
    ).hidden_states[-1]
    fixed = call(base.pipe.text_encoder)
    hooks = len(base.pipe.text_encoder._forward_pre_hooks)
    fix_mm_token_type_ids(base.pipe.text_encoder)
    assert len(base.pipe.text_encoder._forward_pre_hooks) == hooks == 1
    base.pipe.text_encoder._forward_pre_hooks.clear()
    assert not torch.equal(fixed, call(base.pipe.text_encoder))


def test_hash_names_the_folder(base, folder, tmp_path):
    assert base.hash == sha256_folder(folder) == base.backbone.hash
    other = tiny_base(tmp_path / 'other', seed=1)
    again = tiny_base(tmp_path / 'again', seed=0)
    assert sha256_folder(other) != base.hash == sha256_folder(again)


def test_what_is_no_base_is_refused(folder, tmp_path):
    with pytest.raises(UserError, match='model_index.json'):
        load_base(tmp_path)
    write_json(tmp_path / 'model_index.json', dict(_class_name='QwenImagePipeline'))
    with pytest.raises(UserError, match='QwenImagePipeline'):
        load_base(tmp_path)
    import shutil

    from collectionlora.bases.tiny import tiny_tokenizer

    shutil.copytree(folder, tmp_path / 'foreign')
    tiny_tokenizer(['quite other words'], 300).save_pretrained(tmp_path / 'foreign' / 'tokenizer')
    with pytest.raises(UserError, match='system prefix'):
        load_base(tmp_path / 'foreign')


WITHOUT_TORCHVISION = NO_TORCHVISION + """import numpy as np, torch
from PIL import Image
from collectionlora.bases.pipeline import load_base
base = load_base(sys.argv[1])
image = Image.fromarray(np.load(sys.argv[2]))
emb, mask = base.encode_prompts([image, image], ['make the cat red', 'swap'])
np.save(sys.argv[3], emb.numpy())
assert 'torchvision' not in sys.modules and type(base.pipe.processor).__name__ == 'PilProcessor'
"""


@pytest.mark.parametrize('which', ['tiny', pytest.param('nano', marks=pytest.mark.slow)])
def test_loads_and_encodes_without_torchvision(base, which, tmp_path):
    base = base if which == 'tiny' else load_base(nano_dir())
    image = photo(1, (56, 56))
    np.save(tmp_path / 'image.npy', np.asarray(image))
    subprocess.run(
        [
            sys.executable,
            '-W',
            'ignore',
            '-c',
            WITHOUT_TORCHVISION,
            base.folder,
            tmp_path / 'image.npy',
            tmp_path / 'emb.npy',
        ],
        check=True,
    )
    emb, _ = base.encode_prompts([image, image], ['make the cat red', 'swap'])
    assert (
        np.abs(np.load(tmp_path / 'emb.npy') - emb.numpy()).max() < 0.02
    )  # the two resize an image by a rounding apart


def test_the_shipped_base_equals_the_stock_pipeline():
    base, grid = load_base(nano_dir()), (8, 8)
    images = [Image.fromarray(render(draw_scene(rng(i), 'animal'))) for i in range(3)]
    prompts = ['make the cat red', 'a much longer instruction about the background', ' ']
    cond = base.cond(images, prompts)
    assert cond.grids == (grid, grid) and cond.source.shape == (3, 64, 64)
    for i, p in enumerate(prompts):
        e, _ = base.pipe.encode_prompt(
            p, [base.pipe.image_processor.resize(images[i], *base.size(images[i], base.info['condition_area']))]
        )
        assert (cond.index([i]).emb - e).abs().max() < 1e-5
    one, uncond, x1 = cond.index([0]), base.uncond(images[:1]), flow.noise_like((1, 64, 64), [3])
    v = lambda x, t: base.backbone.guided('base', x, t, one, uncond, 4.0, rescale=True)
    with torch.no_grad():
        ours = base.decode(flow.sample_ode(v, x1, base.times(6, grid)), grid, 'np')
    theirs = base.pipe(
        images[0],
        prompts[0],
        ' ',
        true_cfg_scale=4.0,
        height=64,
        width=64,
        num_inference_steps=6,
        latents=x1,
        output_type='np',
    ).images
    assert np.abs(ours - theirs).max() < 1e-5
    again = base.decode(cond.source, grid, 'np')
    assert np.abs(again - np.stack([np.asarray(im) for im in images]) / 255).mean() < 0.05


def test_info_defaults_are_the_full_models(folder, tmp_path):
    from collectionlora.bases.pipeline import read_info

    assert read_info(tmp_path) == dict(vae_area=1024**2, condition_area=384**2, shift=3.0, pixels=1024)
    assert read_info(folder)['vae_area'] == 64 * 64 == read_json(folder / 'collectionlora.json')['vae_area']
    import diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus as stock

    before = use_areas(dict(vae_area=7, condition_area=8))
    assert (
        (stock.VAE_IMAGE_SIZE, stock.CONDITION_IMAGE_SIZE)
        == (7, 8)
        == use_areas(dict(vae_area=before[0], condition_area=before[1]))
    )


def test_a_role_may_not_take_the_name_of_a_module_attribute(folder):
    "torch's ModuleDict, which holds the adapters, has attributes of its own; such a name used to die in a bare KeyError."
    backbone = load_base(folder).backbone
    with pytest.raises(UserError, match='training'):
        backbone.add_role('training', 2)


# --- options that trade memory, time and precision


def gradients(b, role='student', B=2):
    x, t, cond = inputs(B)
    v = b.velocity(role, x, t, cond)
    grads = torch.autograd.grad(v.square().mean(), b.parameters(role), allow_unused=True)
    return v.detach(), torch.cat(
        [torch.zeros(p.numel()) if g is None else g.flatten() for g, p in zip(grads, b.parameters(role))]
    )


@pytest.mark.parametrize('checkpointing', [False, True])
def test_offloaded_activations_give_the_same_bits_and_weights_stay(fresh, checkpointing, monkeypatch):
    with_roles(fresh)
    v, g = gradients(fresh)
    copied, original = [], torch.empty
    monkeypatch.setattr(torch, 'empty', lambda *a, **kw: copied.append(a[0]) or original(*a, **kw))
    fresh.offload(True)
    fresh.checkpointing(checkpointing)
    w, h = gradients(fresh)
    monkeypatch.undo()
    weights = {tuple(p.shape) for p in fresh.transformer.parameters() if p.ndim == 2}
    assert (
        torch.equal(v, w)
        and torch.equal(g, h)
        and len(copied) > (0 if checkpointing else 20)
        and not weights & set(copied)
    )
    with torch.no_grad():
        assert torch.equal(fresh.velocity('student', *inputs()), v)


@pytest.mark.parametrize('kind, deviation', [('int8', 0.02), ('fp8', 0.08)])
def test_an_eight_bit_base_is_near_and_its_adapters_are_as_fine_as_before(folder, fresh, kind, deviation):
    low = load_base(folder, frozen=kind).backbone
    size = lambda b: sum(b.transformer.get_submodule(n).weight.nbytes for n in b.modules())
    assert (
        size(low) == size(fresh) / 4
        and low.hash == load_base(folder).hash
        and low.numerics['frozen'] == kind != fresh.numerics['frozen']
    )
    (v, g), (w, h) = gradients(with_roles(fresh)), gradients(with_roles(low))
    assert 0 < (v - w).norm() / v.norm() < deviation and torch.nn.functional.cosine_similarity(g, h, 0) > 0.98
    assert all(p.dtype == torch.float32 for p in low.parameters('student'))
    low.checkpointing(True)
    assert torch.equal(gradients(low)[1], h)
    with torch.no_grad(), low.merged('student'):
        assert torch.equal(low.velocity('student', *inputs()), w)
    with pytest.raises(UserError, match='too late'):
        low.quantise(kind)
    with pytest.raises(UserError, match="did you mean 'int8'"):
        fresh.quantise('int')


@pytest.mark.parametrize('kind', ['int8', 'fp8'])
def test_an_eight_bit_base_is_never_there_as_it_is(folder, fresh, kind, monkeypatch):
    "Each weight is put in eight bits before the next is read, and the numbers are those of a base quantised whole."
    of_loading, most = pipeline.to_eight_bits, []
    blanks = {}

    def counted(layer, kind):
        most.append(sum(p.numel() for p in blanks['model'].parameters() if p.element_size() > 1 and not p.is_meta))
        of_loading(layer, kind)

    def seen(model):
        blanks['model'] = model
        return adapted_sizes(model)

    monkeypatch.setattr(pipeline, 'to_eight_bits', counted)
    monkeypatch.setattr(pipeline, 'adapted_sizes', seen)
    low = load_base(folder, frozen=kind).backbone
    largest = max(i * o for i, o in fresh.modules().values())
    beside = sum(p.numel() for p in fresh.transformer.parameters()) - sum(i * o for i, o in fresh.modules().values())
    assert len(most) == len(fresh.modules()) and max(most) <= largest + beside
    whole = load_base(folder).backbone
    whole.quantise(kind)
    found = low.transformer.state_dict()
    for name, weight in whole.transformer.state_dict().items():
        assert torch.equal(found[name].float(), weight.float()), name
    assert not any(weight.is_meta for weight in low.transformer.parameters())


def test_an_eight_bit_base_whose_files_lack_a_weight_is_refused(folder, tmp_path):
    broken = tmp_path / 'base'
    shutil.copytree(folder, broken)
    file = next((broken / 'transformer').glob('*.safetensors'))
    weights = load_file(file)
    weights.pop('proj_out.weight')
    save_file(weights, file)
    with pytest.raises(UserError, match='its files lack proj_out.weight'):
        load_base(broken, frozen='int8')


@pytest.mark.parametrize('kind', ['torchao_int8', 'torchao_fp8', 'nf4', 'host', 'disk'])
def test_frozen_weights_of_any_kind_learn_are_offloaded_and_counted(folder, fresh, kind):
    if kind in BY_LIBRARY:
        pytest.importorskip(BY_LIBRARY[kind])
    low = with_roles(load_base(folder, frozen=kind).backbone)
    v, g = gradients(low, B=1)  # one row goes other ways than several
    assert torch.isfinite(v).all() and g.abs().max() > 0
    v, g = gradients(low)
    bytes_of = lambda b: sum(held_bytes(p) for p in b.transformer.parameters() if not p.requires_grad)
    assert bytes_of(low) < bytes_of(with_roles(fresh)) / 2
    assert kept_bytes(low, inputs()[2], 'student') > 0
    low.offload(True)
    w, h = gradients(low)
    assert torch.equal(v, w) and torch.equal(g, h)


def test_a_tensor_of_several_is_counted_by_them():
    two = TwoTensor(torch.zeros(6), torch.zeros(6))
    assert [len(part) for part in held_by(two)] == [6, 6] and held_bytes(two) == 48
    assert held_bytes(torch.zeros(1).expand(100)) == 4


def test_a_base_whose_weights_wait_elsewhere_is_large_all_the_same(folder, monkeypatch):
    monkeypatch.setattr(frugal, 'LARGE', 10_000)
    assert [load_base(folder, frozen=kind).backbone.micro_batch for kind in ('', 'host')] == [1, 1]


def test_compiled_blocks_play_every_role(fresh):
    with_roles(fresh)
    plain = {r: gradients(fresh, r) for r in ROLES}
    fresh.compile(backend='aot_eager')
    try:
        for r in (*ROLES, *reversed(ROLES)):
            v, g = gradients(fresh, r)
            assert torch.allclose(v, plain[r][0], atol=1e-5) and torch.allclose(g, plain[r][1], rtol=1e-3, atol=1e-5)
        with torch.no_grad():
            assert torch.allclose(
                fresh.velocity('base', *inputs()), fresh.velocity({'student': 0.0}, *inputs()), atol=1e-5
            )
    finally:
        fresh.compile(False)
    assert torch.equal(gradients(fresh)[1], plain['student'][1]) and not fresh.numerics['compiled']


def test_a_single_step_of_the_ode_is_refused_where_the_scheduler_has_none(base):
    assert base.times(2, (8, 8))[-1] == 0
    with pytest.raises(UserError, match='1 step of the ODE.*at least 2'):
        base.times(1, (8, 8))
