"""timm: every family of networks with batch normalisation."""

import pytest
import timm
import torch
from test_convert_timm import batch_norms, randomise
from timm.models import list_models, list_modules, model_entrypoint
from torch.testing import assert_close

from mbn import convert, to_batch_norm

pytestmark = pytest.mark.clients("timm")

# A small network of each family, by the name of its module, and the smallest images that it takes.
FAMILIES = {
    "byoanet": ("halonet_h1", 256),
    "byobnet": ("test_byobnet", 64),
    "convmixer": ("convmixer_768_32", 64),
    "cpubone": ("cpubone_nano", 64),
    "cspnet": ("cs3darknet_focus_s", 64),
    "cspnext": ("cspnext_tiny", 64),
    "densenet": ("densenet121", 64),
    "dla": ("dla46x_c", 64),
    "dpn": ("dpn48b", 64),
    "efficientformer": ("efficientformer_l1", 224),
    "efficientformer_v2": ("efficientformerv2_s0", 224),
    "efficientnet": ("test_efficientnet", 64),
    "efficientvim": ("efficientvim_m1", 64),
    "efficientvit_mit": ("efficientvit_b0", 64),
    "efficientvit_msra": ("efficientvit_m0", 224),
    "fasternet": ("fasternet_t0", 64),
    "fastvit": ("fastvit_t8", 64),
    "ghostnet": ("ghostnet_050", 64),
    "hardcorenas": ("hardcorenas_b", 64),
    "hgnet": ("hgnetv2_b0", 64),
    "hrnet": ("hrnet_w18_small", 64),
    "iformer": ("iformer_t", 64),
    "inception_next": ("inception_next_atto", 64),
    "inception_resnet_v2": ("inception_resnet_v2", 96),
    "inception_v3": ("inception_v3", 96),
    "inception_v4": ("inception_v4", 96),
    "lcnetv2": ("lcnetv2_small", 64),
    "levit": ("levit_128s", 224),
    "lowformer": ("lowformer_b0", 64),
    "maxxvit": ("test_coatnet", 160),
    "mobilenetv3": ("mobilenetv3_small_050", 64),
    "mobilevit": ("mobilevit_xxs", 64),
    "nasnet": ("nasnetalarge", 64),
    "nextvit": ("nextvit_small", 64),
    "pnasnet": ("pnasnet5large", 64),
    "regnet": ("regnetx_002", 64),
    "repghost": ("repghostnet_050", 64),
    "repvit": ("repvit_m1", 64),
    "res2net": ("res2next50", 64),
    "resnest": ("resnest14d", 64),
    "resnet": ("test_resnet", 64),
    "resnetv2": ("resnetv2_18", 64),
    "rexnet": ("rexnet_100", 64),
    "selecsls": ("selecsls42", 64),
    "senet": ("legacy_seresnet18", 64),
    "shvit": ("shvit_s1", 64),
    "sknet": ("skresnet18", 64),
    "starnet": ("starnet_s050", 64),
    "swiftformer": ("swiftformer_xs", 224),
    "tiny_vit": ("tiny_vit_5m_224", 64),
    "tresnet": ("tresnet_m", 64),
    "vgg": ("vgg11_bn", 64),
    "visformer": ("visformer_tiny", 224),
    "vision_transformer_hybrid": ("vit_small_resnet50d_s16_224", 224),
    "volo": ("volo_d1_224", 224),
    "vovnet": ("ese_vovnet19b_slim_dw", 64),
    "xception": ("legacy_xception", 64),
    "xception_aligned": ("xception41p", 64),
    "xcit": ("xcit_nano_12_p8_224", 224),
}


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_each_family_converts_with_the_same_outputs_there_and_back(family, figure):
    name, size = FAMILIES[family]
    net, x = timm.create_model(name).eval(), torch.randn(1, 3, size, size)
    assert model_entrypoint(name).__module__ == f"timm.models.{family}"
    classes = [type(layer) for layer in randomise(net)]
    expected = net(x)
    convert(net)
    assert classes
    assert batch_norms(net) == []
    assert_close(net(x), expected)
    back = to_batch_norm(net)
    assert [type(layer) for layer in batch_norms(back)] == classes
    assert_close(back(x), expected)
    figure("the same")


def test_no_other_family_has_batch_normalisation(figure):
    """Each by the first of its networks, without weights."""
    others = set(list_modules()) - set(FAMILIES)
    for family in others:
        for name in list_models(module=family)[:1]:
            with torch.device("meta"):
                net = timm.create_model(name)
            assert batch_norms(net) == [], name
    figure(f"{len(FAMILIES)} families of {len(FAMILIES) + len(others)}")
