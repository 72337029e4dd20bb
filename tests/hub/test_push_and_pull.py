"""Publishing and loading through the real client, over HTTP on the loopback."""

import json

import huggingface_hub
import pytest
import timm
import torch
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors.torch import load_file

import dg_timm
from dg_timm._errors import BadValue, UserError
from dg_timm.hub.downloads import DownloadError
from dg_timm.hub.planning import planned_files
from dg_timm.hub.push import PublishError, push_folder
from tests.helpers.hub import READER, STRANGER, WRITER
from tests.helpers.networks import QUICK, ZOO
from tests.helpers.publishing import logits, pull, small

LABELS = [f"class {k}, 'quoted'" for k in range(10)]
DATA = dict(input_size=(3, 48, 48), mean=[0.1, 0.2, 0.3], std=[0.5, 0.5, 0.5], interpolation="bilinear", crop_pct=1.0)
FILES = ("README.md", "config.json", "model.safetensors")


def asked(hub, method):
    return [request.path.rpartition("/")[2] for request in hub.requests if request.method == method]


def offline(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


# --------------------------------------------------------------------------- there and back


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(n, marks=pytest.mark.slow) for n in ZOO if n not in QUICK)])
def test_there_and_back(name, hub, monkeypatch):
    model = small(name)
    done = dg_timm.push_to_hub(model, "lab/net", label_names=LABELS, data_config=DATA)
    assert done.changed
    assert done.files == FILES
    hub.requests.clear()
    again = pull()
    assert torch.equal(logits(again), logits(model))
    assert again.pretrained_cfg["label_names"] == LABELS
    resolved = timm.data.resolve_model_data_config(again)
    assert {key: resolved[key] for key in DATA} == DATA
    assert again.pretrained_cfg["hf_hub_id"] == "lab/net"
    assert again.pretrained_cfg["source"] == "hf-hub"
    assert not {"file", "state_dict"} & set(again.pretrained_cfg)
    assert asked(hub, "GET").count("model.safetensors") == 1  # from the CDN

    hub.requests.clear()
    assert torch.equal(logits(pull()), logits(model))
    assert not asked(hub, "GET")  # the second time from the cache

    offline(monkeypatch)
    hub.requests.clear()
    assert torch.equal(logits(pull()), logits(model))
    assert not hub.requests


@pytest.mark.parametrize("features", ["list", "dict", "hook", "getter"])
def test_features_and_embeddings_from_the_hub(hub, features):
    model = small()
    dg_timm.push_to_hub(model, "lab/net")
    backbone = pull(features_only=True, feature_cls=features).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        maps = backbone(x)
        last = list(maps.values())[-1] if isinstance(maps, dict) else maps[-1]
        assert torch.equal(last, model.forward_features(x))
        assert torch.equal(pull(num_classes=0).eval()(x), model.forward_head(model.forward_features(x), True))
    for part in backbone.modules():  # no second copy of the weights stays behind
        assert "state_dict" not in (getattr(part, "pretrained_cfg", None) or {})


def test_a_model_with_other_channels_and_options(hub):
    model = small(in_chans=1, edge_scale=False, block_shortcut=False)
    dg_timm.push_to_hub(model, "lab/net")
    again = pull()
    x = torch.randn(2, 1, 48, 48)
    with torch.inference_mode():
        assert torch.equal(again.eval()(x), model(x))
    assert not any(stage.block_shortcut for stage in dg_timm.graph.stage.graph_stages(again).values())


def test_labels_survive_a_second_publication(hub):
    """Pulled, saved again without a word: the labels are still those."""
    dg_timm.push_to_hub(small(), "lab/net", label_names=LABELS)
    dg_timm.push_to_hub(pull(), "lab/copy")
    assert pull("lab/copy").pretrained_cfg["label_names"] == LABELS
    fewer = pull(num_classes=3)
    dg_timm.push_to_hub(fewer, "lab/fewer")
    assert "label_names" not in pull("lab/fewer").pretrained_cfg
    card = huggingface_hub.ModelCard.load("lab/fewer")
    assert card.data.base_model == "lab/net"


# --------------------------------------------------------------------------- what is sent


def test_the_same_content_makes_no_commit(hub):
    model = small()
    first = dg_timm.push_to_hub(model, "lab/net")
    again = dg_timm.push_to_hub(model, "lab/net")
    assert (again.changed, again.commit) == (False, first.commit)
    assert len(hub.repositories.log("lab/net")) == 2  # the Hub's own first one, and ours
    with torch.no_grad():
        model.get_classifier().bias.add_(1)
    third = dg_timm.push_to_hub(model, "lab/net", commit_message="a better bias")
    assert third.changed
    assert hub.repositories.log("lab/net")[0] == "a better bias"
    assert torch.equal(logits(pull(f"lab/net@{first.commit}")) + 1, logits(model))


def test_only_listed_files_are_sent(hub, tmp_path):
    folder = dg_timm.save_pretrained(small(), tmp_path / "model")
    for name in ("optimizer.bin", ".env", "secret.txt", "model.safetensors.tmp"):
        (folder / name).write_text(f"token {WRITER}", encoding="utf-8")
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "model.safetensors").write_bytes(b"no")
    push_folder(folder, "lab/net")
    assert sorted(huggingface_hub.list_repo_files("lab/net")) == sorted(FILES)


def test_shards(hub, monkeypatch):
    model = small()
    dg_timm.push_to_hub(model, "lab/net")
    done = dg_timm.push_to_hub(model, "lab/net", max_shard_size="3MB")
    shards = [name for name in done.files if name.startswith("model-")]
    assert len(shards) > 2
    # the single file is gone: timm would take it for the newest
    assert sorted(huggingface_hub.list_repo_files("lab/net")) == sorted(done.files)
    again = pull()
    assert torch.equal(logits(again), logits(model))
    assert "state_dict" not in again.pretrained_cfg
    offline(monkeypatch)
    assert torch.equal(logits(pull()), logits(model))


def test_branches_and_pull_requests(hub, monkeypatch):
    model, other = small(), small()
    dg_timm.push_to_hub(model, "lab/net")
    dg_timm.push_to_hub(other, "lab/net", revision="wider")
    assert torch.equal(logits(pull()), logits(model))
    assert torch.equal(logits(pull("lab/net@wider")), logits(other))
    monkeypatch.setenv("HF_TOKEN", STRANGER)
    proposed = dg_timm.push_to_hub(other, "lab/net", create_pr=True)
    assert proposed.url.endswith("/lab/net/discussions/1")
    assert torch.equal(logits(pull()), logits(model))


def test_private(hub, monkeypatch):
    model = small()
    dg_timm.push_to_hub(model, "lab/secret", private=True)
    assert torch.equal(logits(pull("lab/secret")), logits(model))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", huggingface_hub.constants.HF_HUB_CACHE + "-other")
    monkeypatch.setenv("HF_TOKEN", READER)
    assert torch.equal(logits(pull("lab/secret")), logits(model))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", huggingface_hub.constants.HF_HUB_CACHE + "-eve")
    monkeypatch.setenv("HF_TOKEN", STRANGER)
    with pytest.raises(RepositoryNotFoundError, match="make sure you are authenticated"):
        pull("lab/secret")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(RepositoryNotFoundError, match="make sure you are authenticated"):
        pull("lab/secret")


def test_private_is_never_published_into_a_public_repository(hub):
    dg_timm.push_to_hub(small(), "lab/net")
    head = hub.repositories.log("lab/net")
    with pytest.raises(ValueError, match="lab/net exists and is public; nothing was sent"):
        dg_timm.push_to_hub(small(), "lab/net", private=True)
    assert hub.repositories.log("lab/net") == head


def test_the_published_card_loads_the_network_from_the_hub(hub):
    dg_timm.push_to_hub(small(), "lab/net", card=dg_timm.Card(summary="Mine."))
    text = huggingface_hub.ModelCard.load("lab/net").content
    assert 'timm.create_model("hf-hub:lab/net", pretrained=True)' in text
    assert 'pipeline("image-classification", model="lab/net")' in text
    assert "PATH_OF_THIS_FOLDER" not in text
    assert "Mine." in text


def test_an_edited_card_is_published_as_it_was_edited(hub, tmp_path):
    folder = dg_timm.save_pretrained(small(), tmp_path / "model")
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8").replace("# Model card", "Edited by hand.\n\n# Model card")
    card.write_text(text, encoding="utf-8")
    push_folder(folder, "lab/net")
    assert "Edited by hand." in huggingface_hub.ModelCard.load("lab/net").content
    assert "PATH_OF_THIS_FOLDER" in card.read_text(encoding="utf-8")  # the user's own file is as it was


# --------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("repo_id", ["../../etc/passwd", "lab/../net", "lab//net", "a/b/c", "lab/net@main", "net", ""])
def test_a_repository_id_that_is_none(hub, repo_id):
    with pytest.raises(ValueError, match=r"is not a repository id|names no owner"):
        dg_timm.push_to_hub(small(), repo_id)
    assert not hub.requests


@pytest.mark.parametrize("revision", ["", "a b..c", "-x", "../up"])
def test_a_revision_that_is_no_branch(hub, revision):
    with pytest.raises(ValueError, match="revision must be the name of a branch"):
        dg_timm.push_to_hub(small(), "lab/net", revision=revision)
    assert not hub.requests


def test_a_pull_request_needs_a_repository(hub):
    with pytest.raises(ValueError, match="lab/typo does not exist"):
        dg_timm.push_to_hub(small(), "lab/typo", create_pr=True)


def test_front_matter_that_the_hub_refuses(hub, tmp_path):
    folder = dg_timm.save_pretrained(small(), tmp_path / "model")
    card = folder / "README.md"
    right = "pipeline_tag: image-classification"
    for spoiled in ("pipeline_tag: nonsense", "model-index: nonsense", "datasets: 5", "base_model: {a: 1}"):
        text = card.read_text(encoding="utf-8")
        card.write_text(text.replace(right, spoiled), encoding="utf-8")
        with pytest.raises(UserError, match=r"does not accept this card|has no valid front matter"):
            push_folder(folder, "lab/net")
        card.write_text(text, encoding="utf-8")
    assert push_folder(folder, "lab/net").changed


@pytest.mark.parametrize(("token", "match"), [(STRANGER, "may not write to lab/net"), (READER, "may not write to lab")])
def test_a_token_without_the_right(hub, monkeypatch, token, match):
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(PublishError, match=match):
        dg_timm.push_to_hub(small(), "lab/net")


def test_no_token_and_a_wrong_one(hub, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(PublishError, match="hf auth login"):
        dg_timm.push_to_hub(small(), "lab/net")
    with pytest.raises(PublishError, match="hf auth login"):
        dg_timm.push_to_hub(small(), "lab/net", token="hf_wrong")


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("model.safetensors", None, "has no model.safetensors"),
        ("config.json", None, "has no config.json"),
        ("config.json", lambda old: b"{", "config.json is not valid JSON"),
        ("config.json", lambda old: b'{"architecture": "resnet18"}', "'resnet18', which timm does not know"),
        ("config.json", lambda old: old.replace(b"dg_regnetx_002", b"dg_convnext_pico"), "dg_timm.models.register"),
        ("config.json", lambda old: b"[]", "names the architecture None"),
        ("config.json", lambda old: b'{"architecture": null}', "names the architecture None"),
        ("config.json", lambda old: old.replace(b"x_002", b"x_004"), "does not describe the network"),
        ("config.json", lambda old: old.replace(b'"pretrained_cfg"', b'"cfg"'), "does not describe the network"),
        ("model.safetensors", lambda old: old[:-5], "is damaged"),
        ("model-00001-of-00002.safetensors", lambda old: b"", "should hold the weights model.safe"),
        ("model.safetensors.index.json", lambda old: b"{}", "holds both model.safetensors and shards"),
        ("README.md", lambda old: b"---\n: [\n---\n", "has no valid front matter"),
        ("README.md", lambda old: b"\xff\xfe", "has no valid front matter"),
        ("README.md", lambda old: b"# Mine", "has no front matter"),
    ],
)
def test_a_folder_that_is_not_valid_is_not_sent(hub, tmp_path, name, content, match):
    file = dg_timm.save_pretrained(small(), tmp_path / "model") / name
    old = file.read_bytes() if file.exists() else b""
    file.unlink(missing_ok=True)
    if content is not None:
        file.write_bytes(content(old))
    with pytest.raises(BadValue, match=match):
        push_folder(file.parent, "lab/net")
    assert not hub.requests


def test_an_index_that_is_not_valid_is_not_sent(hub, tmp_path):
    folder = dg_timm.save_pretrained(small(), tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "model.safetensors.index.json")
    with pytest.raises(BadValue, match="is not a valid index of shards"):
        push_folder(folder, "lab/net")
    assert not hub.requests


def test_planned_files_need_no_hub(tmp_path):
    folder = dg_timm.save_pretrained(small(), tmp_path / "model")
    files = planned_files(folder, "lab/net")
    assert tuple(files) == FILES
    assert b"hf-hub:lab/net" in files["README.md"]


def test_nothing_cached_and_no_connection(hub, monkeypatch):
    """Of the tags of the zoo the message is ours; of hf-hub: names it is the client's, which asks for a connection."""
    offline(monkeypatch)
    with pytest.raises(DownloadError, match=r"timm/resnet18.a1_in1k are not in the cache.*HF_HUB_OFFLINE"):
        timm.create_model("dg_resnet18.a1_in1k", pretrained=True)
    with pytest.raises(LocalEntryNotFoundError, match="check your connection"):
        pull()


def test_configurations_keep_no_secrets_and_no_num_classes(hub, tmp_path):
    folder = dg_timm.save_pretrained(small(), tmp_path / "model")
    dg_timm.push_to_hub(small(), "lab/net", token=WRITER)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert "num_classes" not in config.get("model_args", {})
    assert config["num_classes"] == 10
    for path in (tmp_path / "hub").glob("**/*"):
        assert not path.is_file() or WRITER.encode() not in path.read_bytes(), path
    assert load_file(folder / "model.safetensors").keys() == small().state_dict().keys()
