"Loaders of CLIP, DINO, DINOv2 and DreamSim against their original packages at random weights, preparation included."

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from collectionlora.core import UserError
from collectionlora.judge import networks
from collectionlora.judge.metrics import IMAGENET, nano_encoders, OPENAI, Prepare

BOUND = 1e-5
SMALL = dict(hidden_size=64, intermediate_size=256, num_hidden_layers=3, num_attention_heads=1)


@pytest.fixture(scope='module')
def pictures():
    "Smooth coloured noise of several shapes, with a hard edge."
    g, out = np.random.default_rng(0), []
    for w, h in ((97, 64), (64, 131), (80, 80), (300, 217)):
        x = Image.fromarray(g.integers(0, 256, (9, 9, 3), dtype=np.uint8)).resize((w, h), Image.Resampling.BICUBIC)
        x.paste((250, 10, 30), (w // 3, h // 3, w // 2, h // 2))
        out.append(x)
    return out


def near(what, ours, theirs):
    "Whether two arrays agree to `BOUND`; `pytest -s` prints the largest difference."
    far = float(np.abs(np.asarray(ours) - np.asarray(theirs)).max())
    print(f'parity: {what}: {far:.1e}')
    return far < BOUND


def unit(x):
    x = x.detach().float().numpy()
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def shaken(model, seed=0):
    "The model with weights that no layer starts with: biases and norms are random, too."
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=g) * 0.05)
    return model.eval()


@pytest.mark.parametrize('quick', [True, False])
@pytest.mark.parametrize('mode', ['shortest', 'squash'])
def test_clip_equals_open_clip(tmp_path, pictures, quick, mode):
    open_clip = pytest.importorskip('open_clip')
    vision = dict(image_size=64, layers=3, width=64, head_width=32, patch_size=16)
    text = dict(context_length=8, vocab_size=50, width=32, heads=2, layers=1)
    model = shaken(open_clip.model.CLIP(32, vision, text, quick_gelu=quick))
    prepare = open_clip.transform.image_transform_v2(
        open_clip.transform.PreprocessCfg(size=64, resize_mode=mode), is_train=False
    )
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, tmp_path / 'open_clip_model.safetensors')
    about = dict(
        model_cfg=dict(embed_dim=32, quick_gelu=quick, vision_cfg=vision), preprocess_cfg=dict(resize_mode=mode)
    )
    (tmp_path / 'open_clip_config.json').write_text(json.dumps(about))
    encoder = networks.clip_encoder(tmp_path)
    for p in pictures:
        assert near(f'open_clip, {mode}, picture prepared', prepare(p), encoder.prepare(p))
    with torch.no_grad():
        theirs = unit(model.encode_image(torch.stack([prepare(p) for p in pictures])))
    assert near(f'open_clip, {mode}, {"quick " if quick else ""}GELU', theirs, encoder.embed(pictures))
    other = networks.clip_encoder(tmp_path / 'open_clip_model.safetensors', quick_gelu=not quick)
    if mode == 'shortest':  # a file alone is prepared so; with the wrong activation the numbers differ
        assert np.abs(theirs - other.embed(pictures)).max() > 10 * BOUND


def test_clip_equals_transformers_with_its_processor(tmp_path, pictures):
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    vision = dict(image_size=64, patch_size=16, **SMALL)
    model = shaken(CLIPModel(CLIPConfig(vision_config=vision, text_config=SMALL, projection_dim=48)))
    model.save_pretrained(tmp_path)
    encoder = networks.clip_encoder(tmp_path)
    processor = CLIPImageProcessor(size=dict(shortest_edge=64), crop_size=dict(height=64, width=64))
    ours = np.stack([encoder.prepare(p) for p in pictures])
    theirs = torch.cat([torch.as_tensor(np.asarray(processor(p)['pixel_values'])) for p in pictures])
    far = np.abs(ours - theirs.numpy()).max((1, 2, 3))
    level = 1 / (255 * min(OPENAI[1]))  # the processor resamples tensors of bytes: at most one level of 255 aside
    assert (far[[0, 2, 3]] <= 1.01 * level).all()
    assert (
        far[1] > level
    )  # a margin of 67 rows: torchvision, hence OpenAI and we, cut after row 34, the processor after 33
    with torch.no_grad():
        found = unit(model.get_image_features(pixel_values=torch.from_numpy(ours)).pooler_output)
    assert found.shape[1] == 48 and near('transformers CLIP', found, encoder.embed(pictures))


NAMES = {'attn.proj': 'attention.output.dense'}
FACEBOOK = {**NAMES, 'norm1': 'layernorm_before', 'norm2': 'layernorm_after'}
FACEBOOK |= {'mlp.fc1': 'intermediate.dense', 'mlp.fc2': 'output.dense'}
TIMM = {**NAMES, **{k: k for k in ('norm1', 'norm2', 'mlp.fc1', 'mlp.fc2')}}


def renamed(vit, names):
    "A vision transformer as the state of transformers' models; `names`: of the parts of a block, as they are called there."
    state, out = vit.state_dict(), {}
    for k, v in state.items():
        if not k.startswith('blocks.'):
            continue
        _, i, *rest, part = k.split('.')
        rest = '.'.join(rest)
        if rest == 'attn.qkv':
            for name, third in zip(('query', 'key', 'value'), v.chunk(3)):
                out[f'encoder.layer.{i}.attention.attention.{name}.{part}'] = third.contiguous()
        elif rest in ('ls1', 'ls2'):
            out[f'encoder.layer.{i}.layer_scale{rest[-1]}.lambda1'] = v
        else:
            out[f'encoder.layer.{i}.{names[rest]}.{part}'] = v
    out |= {f'layernorm.{p}': state[f'norm.{p}'] for p in ('weight', 'bias')}
    out |= {f'embeddings.patch_embeddings.projection.{p}': state[f'patch_embed.proj.{p}'] for p in ('weight', 'bias')}
    return out | {'embeddings.cls_token': state['cls_token'], 'embeddings.position_embeddings': state['pos_embed']}


def test_dino_equals_facebooks_code_and_dreambooths_preparation(tmp_path, pictures):
    vision_transformer = pytest.importorskip('dreamsim.feature_extraction.vision_transformer')
    from torchvision import transforms

    vit = shaken(
        vision_transformer.VisionTransformer(
            patch_size=32,
            embed_dim=64,
            depth=3,
            num_heads=1,
            qkv_bias=True,
            norm_layer=lambda d: torch.nn.LayerNorm(d, eps=1e-6),
        )
    )
    save_file(
        {k: v.contiguous() for k, v in renamed(vit, FACEBOOK).items()}, tmp_path / 'model.safetensors', {'format': 'pt'}
    )
    about = dict(model_type='vit', image_size=224, patch_size=32, layer_norm_eps=1e-6, **SMALL)
    (tmp_path / 'config.json').write_text(json.dumps(about))
    encoder = networks.dino_encoder(tmp_path)
    bicubic = transforms.InterpolationMode.BICUBIC
    steps = [transforms.Resize(256, interpolation=bicubic), transforms.CenterCrop(224), transforms.ToTensor()]
    prepare = transforms.Compose([*steps, transforms.Normalize(*IMAGENET)])
    for p in pictures:
        assert near("DreamBooth's preparation", prepare(p), encoder.prepare(p))
    with torch.no_grad():
        theirs = unit(vit(torch.stack([prepare(p) for p in pictures])))
    assert near('DINO, Facebook code', theirs, encoder.embed(pictures)) and encoder.prepare.words == 'crop256-224'


def test_dinov2_equals_timm(tmp_path, pictures):
    timm = pytest.importorskip('timm')
    from transformers import Dinov2Config, Dinov2Model

    sizes = dict(img_size=56, patch_size=14, embed_dim=64, depth=3, num_heads=1)
    vit = shaken(
        timm.models.vision_transformer.VisionTransformer(**sizes, init_values=1e-5, num_classes=0, global_pool='token')
    )
    config = Dinov2Config(image_size=56, patch_size=14, hidden_size=64, num_hidden_layers=3, num_attention_heads=1)
    model, state = Dinov2Model(config), renamed(vit, TIMM)
    state |= {'embeddings.mask_token': torch.zeros(1, 64)}
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / 'model.safetensors', {'format': 'pt'})
    config.save_pretrained(tmp_path)
    encoder = networks.dino_encoder(tmp_path)
    x = torch.from_numpy(np.stack([encoder.prepare(p) for p in pictures]))
    with torch.no_grad():
        theirs = unit(vit(x))
    assert encoder.name.startswith('dinov2') and near('DINOv2, timm', theirs, encoder.embed(pictures))


def packaged(folder, monkeypatch, sizes):
    "The package's own `dreamsim()` on random weights of these sizes, in the layout of its cache, its LoRA random too."
    dreamsim = pytest.importorskip('dreamsim')
    from dreamsim.feature_extraction import load_clip_as_dino, load_open_clip_as_dino, vision_transformer
    from peft import get_peft_model, LoraConfig

    norm = lambda d: torch.nn.LayerNorm(d, eps=1e-6)
    small = lambda **kw: vision_transformer.VisionTransformer(
        **sizes, depth=12, mlp_ratio=4, qkv_bias=True, norm_layer=norm
    )
    dino, width = shaken(small()), sizes['embed_dim']
    for module, name in ((load_clip_as_dino, 'clip_vitb16'), (load_open_clip_as_dino, 'open_clip_vitb16')):
        monkeypatch.setattr(module, 'vit_base', small)
        tower = small()
        tower.pos_drop = torch.nn.LayerNorm(width)
        state = shaken(tower, len(name)).state_dict() | {
            'proj': torch.randn(width, 40, generator=torch.Generator().manual_seed(3))
        }
        torch.save({'state_dict': state}, folder / f'{name}_pretrain.pth.tar')
    monkeypatch.setattr(torch.hub, 'load', lambda *a, **k: dino)
    monkeypatch.setattr(torch.hub, 'set_dir', lambda d: None)
    head = {f'module.head.mlp.{i}.{p}': torch.zeros(1) for i in (0, 2, 4) for p in ('weight', 'bias')}
    torch.save(
        {'student': head | {'module.head.last_layer.weight': torch.zeros(1)}}, folder / 'dino_vitb16_pretrain.pth'
    )
    bare = dreamsim.model.PerceptualModel(
        'dino_vitb16,clip_vitb16,open_clip_vitb16',
        'cls,embedding,embedding',
        '16,16,16',
        lora=True,
        load_dir=str(folder),
        normalize_embeds=True,
        device='cpu',
    )
    lora = get_peft_model(bare, LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, bias='none', target_modules=['qkv']))
    with torch.no_grad():
        for name, p in lora.named_parameters():
            if 'lora_' in name:
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))) * 0.2)
    lora.save_pretrained(folder / 'ensemble_lora')
    return dreamsim.dreamsim(pretrained=True, device='cpu', cache_dir=str(folder))


def dreamsim_difference(folder, monkeypatch, pictures, sizes):
    "(largest difference of preparation, of distances; largest distance) between the package and our file."
    model, prepare = packaged(folder, monkeypatch, sizes)
    with torch.no_grad():
        x = torch.cat([prepare(p) for p in pictures])
        theirs = np.array([[float(model(x[i : i + 1], x[j : j + 1])) for j in range(len(x))] for i in range(len(x))])
    encoder = networks.dreamsim_encoder(networks.export_dreamsim(model, folder / 'ours.safetensors'))
    v = encoder.embed(pictures)
    ready = max(np.abs(prepare(p)[0].numpy() - encoder.prepare(p)).max() for p in pictures)
    return ready, np.abs(theirs - encoder.compare(v @ v.T)).max(), theirs.max()


def test_dreamsim_equals_the_package(tmp_path, monkeypatch, pictures):
    sizes = dict(img_size=[224], patch_size=16, embed_dim=48, num_heads=3)
    ready, far, largest = dreamsim_difference(tmp_path, monkeypatch, pictures, sizes)
    print(f'parity: DreamSim, picture prepared: {ready:.1e}\nparity: DreamSim, distances: {far:.1e}')
    assert ready < BOUND and far < BOUND and largest > 100 * BOUND


@pytest.mark.slow
def test_dreamsim_equals_the_package_at_full_size(tmp_path, monkeypatch, pictures):
    sizes = dict(img_size=[224], patch_size=16, embed_dim=768, num_heads=12)
    ready, far, largest = dreamsim_difference(tmp_path, monkeypatch, pictures[:2], sizes)
    assert ready < BOUND and far < BOUND and largest > 100 * BOUND


def test_another_export_is_refused(tmp_path):
    class Other:
        extractor_list, feat_type_list, model_list = [1], ['cls'], ['dino_vitb16']

    with pytest.raises(UserError, match='export the type ensemble'):
        networks.export_dreamsim(Other(), tmp_path / 'x.safetensors')


def test_a_weight_that_is_missing_is_an_error_and_not_a_random_number(tmp_path):
    from transformers import ViTConfig, ViTModel

    ViTModel(ViTConfig(image_size=32, patch_size=16, **SMALL), add_pooling_layer=False).save_pretrained(tmp_path)
    state = load_file(tmp_path / 'model.safetensors')
    gone = sorted(state)[5]
    save_file({k: v for k, v in state.items() if k != gone}, tmp_path / 'model.safetensors', {'format': 'pt'})
    with pytest.raises(UserError, match='missing'):
        networks.dino_encoder(tmp_path)


def test_nano_encoders_have_the_same_interface(pictures):
    for encoder in nano_encoders().values():
        v = encoder.embed(pictures)
        assert v.shape == (4, 64) and np.allclose(encoder.embed(pictures, batch=1), v, atol=BOUND)
    assert Prepare(64, 'letterbox')(pictures[0]).shape == (3, 64, 64)


def test_openais_archives_open_only_with_their_published_hash(tmp_path, monkeypatch, pictures):
    open_clip = pytest.importorskip('open_clip')
    from open_clip.pretrained import get_pretrained_url

    published = networks.listed()['openai']['files']
    for name, digest in published.items():
        assert f'/{digest}/{name}' in get_pretrained_url(name.removesuffix('.pt'), 'openai')
    vision = dict(image_size=64, layers=2, width=64, head_width=64, patch_size=16)
    model = shaken(
        open_clip.model.CLIP(32, vision, dict(context_length=8, vocab_size=50, width=32, heads=2, layers=1), True)
    )
    file = tmp_path / 'ViT-B-32.pt'
    torch.jit.trace_module(model, {'encode_image': torch.zeros(1, 3, 64, 64)}, check_trace=False).save(file)
    with pytest.raises(UserError, match='not the file that OpenAI published'):
        networks.open_encoder(file)
    monkeypatch.setattr(networks, 'listed', lambda: {'openai': {'files': {file.name: networks.sha256_file(file)}}})
    encoder = networks.open_encoder(file)
    with torch.no_grad():
        theirs = unit(model.encode_image(torch.from_numpy(np.stack([encoder.prepare(p) for p in pictures]))))
    assert near('OpenAI archive', theirs, encoder.embed(pictures))


def test_lpips_equals_the_package(tmp_path, pictures):
    package = pytest.importorskip('lpips')
    from collectionlora.judge.outside import open_lpips

    torch.manual_seed(0)
    theirs = package.LPIPS(net='alex', pnet_rand=True, spatial=True, verbose=False).eval()
    own = {f'features.{k.split(".", 1)[1]}': v for k, v in theirs.net.state_dict().items()}
    torch.save(own, tmp_path / 'alexnet-random.pth')
    torch.save(
        {k: v for k, v in theirs.state_dict().items() if k[:4] in ('lin0', 'lin1', 'lin2', 'lin3', 'lin4')},
        tmp_path / 'alex.pth',
    )
    ours = open_lpips(tmp_path)
    for p in pictures:
        x, y = np.asarray(p), np.asarray(p.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
        pair = [torch.from_numpy(v.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1 for v in (x, y)]
        with torch.no_grad():
            wanted = theirs(*pair)[0, 0].numpy()
        assert wanted.max() > 0 and near('LPIPS map', ours.map(x, y), wanted)


def test_csd_equals_its_formula_on_open_clips_tower(tmp_path, pictures):
    "CSD: the class token of CLIP's tower before its projection, times `last_layer_style`."
    import argparse

    open_clip = pytest.importorskip('open_clip')
    vision = dict(image_size=64, layers=3, width=64, head_width=64, patch_size=16)
    model = shaken(
        open_clip.model.CLIP(
            32, vision, dict(context_length=8, vocab_size=50, width=32, heads=2, layers=1), quick_gelu=True
        )
    )
    model.visual.proj = None
    style = torch.randn(64, 24, generator=torch.Generator().manual_seed(1))
    state = {f'module.backbone.{k}': v for k, v in model.visual.state_dict().items()}
    state |= {'module.last_layer_style': style, 'module.last_layer_content': style * 2}
    torch.save(dict(model_state_dict=state, args=argparse.Namespace(lr=1)), tmp_path / 'csd.pth')
    encoder = networks.open_encoder(tmp_path / 'csd.pth')
    with torch.no_grad():
        theirs = unit(model.visual(torch.from_numpy(np.stack([encoder.prepare(p) for p in pictures]))) @ style)
    assert near('CSD', theirs, encoder.embed(pictures)) and encoder.spec().name.startswith('CSD[csd-vit-64-16')
    torch.save(dict(state_dict={'a': style}), tmp_path / 'other.pth')
    with pytest.raises(UserError, match='no checkpoint of CSD'):
        networks.open_encoder(tmp_path / 'other.pth')


def test_an_exported_network_is_opened_by_the_table_beside_it(tmp_path, pictures):
    class Means(torch.nn.Module):
        def forward(self, x):
            return x.mean((2, 3)) + 1

    dims = [{0: torch.export.Dim('batch', min=1, max=64)}]
    torch.export.save(
        torch.export.export(Means(), (torch.zeros(2, 3, 8, 8),), dynamic_shapes=dims), tmp_path / 'face.pt2'
    )
    with pytest.raises(UserError, match='face.json: no such file'):
        networks.open_encoder(tmp_path / 'face.pt2')
    said = dict(metric='face identity', size=8, way='squash', mean=[0.5] * 3, std=[0.5] * 3)
    for wrong, words in (
        (said | dict(way='stretch'), "unknown key 'stretch'"),
        (said | dict(crop=1), "unknown key 'crop'"),
    ):
        (tmp_path / 'face.json').write_text(json.dumps(wrong))
        with pytest.raises(UserError, match=words):
            networks.open_encoder(tmp_path / 'face.pt2')
    (tmp_path / 'face.json').write_text(json.dumps(said))
    encoder = networks.open_encoder(tmp_path / 'face.pt2')
    assert encoder.embed(pictures).shape == (4, 3) and encoder.metric == 'face identity'
