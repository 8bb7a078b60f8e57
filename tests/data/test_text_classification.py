"""Text classification from folders and files, by bytes and by a tokenizer; every wrong key is named."""

import datasets
import pytest
import torch

from approx_attn.data.text_classification import TextClassificationData
from approx_attn.errors import ConfigWarning

TRAIN = {
    "text": [f"review number {i} " + "good bad "[i % 2 * 5 :] for i in range(50)],
    "label": [i % 2 for i in range(50)],
}
TEST = {"text": ["ä" * 30, "short"], "label": [1, 0]}


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "set"
    path.mkdir()
    datasets.Dataset.from_dict(TRAIN).to_parquet(str(path / "train.parquet"))
    datasets.Dataset.from_dict(TEST).to_parquet(str(path / "test.parquet"))
    return str(path)


def texts(loader) -> list[tuple[str, int]]:
    return [
        (bytes((tokens[keep] - 1).tolist()).decode(), label.item())
        for batch in loader
        for tokens, keep, label in zip(batch["tokens"], batch["keep"], batch["labels"], strict=True)
    ]


def test_bytes_and_labels_come_through(folder):
    data = TextClassificationData(path=folder, max_length=100, batch_size=1)
    data.prepare_data()
    data.setup()
    assert data.spec.num_items == (45, 5, 2)
    assert (data.spec.vocab_size, data.spec.num_classes, data.spec.causal) == (257, 2, False)
    assert texts(data.test_dataloader()) == list(zip(*TEST.values(), strict=True))
    both = texts(data.train_dataloader()) + texts(data.val_dataloader())
    assert sorted(both) == sorted(zip(*TRAIN.values(), strict=True))


def test_spec_sets_the_data_up_when_asked_first(folder):
    assert TextClassificationData(path=folder).spec.num_classes == 2


@pytest.mark.parametrize(("side", "expected"), [("right", "sho"), ("left", "ort")])
def test_truncation(folder, side, expected):
    data = TextClassificationData(path=folder, max_length=3, truncation_side=side)
    assert next(iter(data.test_dataloader()))["tokens"].shape == (2, 3)
    assert bytes((next(iter(data.test_dataloader()))["tokens"][1] - 1).tolist()).decode() == expected


def test_pad_to_longest(folder):
    data = TextClassificationData(path=folder, max_length=1000, pad_to_longest=True)
    assert next(iter(data.test_dataloader()))["tokens"].shape == (2, 60)


def test_subsamples_are_seeded_and_the_validation_set_does_not_depend_on_them(folder):
    all_of_it = TextClassificationData(path=folder)
    few = TextClassificationData(path=folder, train_size=7, seed=5, batch_size=1)
    assert few.spec.num_items == (7, 5, 2)
    assert texts(few.val_dataloader()) == texts(all_of_it.val_dataloader())
    assert set(texts(few.train_dataloader())) == set(
        texts(TextClassificationData(path=folder, train_size=7, batch_size=1).train_dataloader())
    )
    assert set(texts(few.train_dataloader())).isdisjoint(texts(few.val_dataloader()))
    other = TextClassificationData(path=folder, data_seed=1)
    assert texts(other.val_dataloader()) != texts(few.val_dataloader())


@pytest.mark.parametrize("kind", ["csv", "json", "disk"])
def test_other_kinds_of_folders(tmp_path, kind):
    path = tmp_path / kind
    splits = {"train": datasets.Dataset.from_dict(TRAIN), "test": datasets.Dataset.from_dict(TEST)}
    if kind == "disk":
        datasets.DatasetDict(splits).save_to_disk(str(path))
    else:
        path.mkdir()
        for name, split in splits.items():
            getattr(split, f"to_{kind}")(str(path / f"{name}.{kind}"))
    data = TextClassificationData(path=str(path), max_length=100)
    assert texts(data.test_dataloader()) == list(zip(*TEST.values(), strict=True))


def test_labels_may_be_text(tmp_path):
    named = {"text": TRAIN["text"], "label": [["neg", "pos"][label] for label in TRAIN["label"]]}
    datasets.Dataset.from_dict(named).to_parquet(str(tmp_path / "train.parquet"))
    data = TextClassificationData(path=str(tmp_path), test_split=None, test_share=0.4, max_length=100)
    assert data.spec.class_names == ("neg", "pos")
    both = {**dict(texts(data.train_dataloader())), **dict(texts(data.test_dataloader()))}
    assert both.items() <= dict(zip(*TRAIN.values(), strict=True)).items()


def test_a_single_file_is_split_in_three(tmp_path):
    datasets.Dataset.from_dict(TRAIN).to_csv(str(tmp_path / "one.csv"))
    data = TextClassificationData(path=str(tmp_path / "one.csv"), val_share=0.1, test_share=0.2, batch_size=1)
    assert data.spec.num_items == (35, 5, 10)
    parts = [texts(loader) for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())]
    assert sorted(row for part in parts for row in part) == sorted(zip(*TRAIN.values(), strict=True))
    again = TextClassificationData(path=str(tmp_path / "one.csv"), val_share=0.1, test_share=0.2, seed=9)
    assert texts(again.test_dataloader()) == parts[2]


def test_tokenizer(folder, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    words = ["[PAD]", "[UNK]", "review", "number", "good", "bad", "short"]
    plain = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
    )
    plain.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(
        str(tmp_path / "tokenizer")
    )
    data = TextClassificationData(path=folder, tokenizer=str(tmp_path / "tokenizer"), max_length=8)
    batch = next(iter(data.test_dataloader()))
    assert data.spec.vocab_size == len(words)
    assert batch["tokens"].tolist() == [[1] + [0] * 7, [6] + [0] * 7]
    train = next(iter(data.train_dataloader()))
    assert (train["tokens"][:, :2] == torch.tensor([2, 3])).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": None}, r"data\.path"),
        ({"path": "/no/such/folder"}, r"data\.path='/no/such/folder' does not exist"),
        ({"path": "no-such-hub-id"}, r"data\.path='no-such-hub-id'"),
        ({"text_column": "body"}, r"data\.text_column='body'.* text, label"),
        ({"label_column": "class"}, r"data\.label_column='class'.* text, label"),
        ({"train_split": "training"}, r"data\.train_split='training'.* train, test"),
        ({"val_split": "validation"}, r"data\.val_split='validation'.* train, test"),
        ({"test_split": "tests"}, r"data\.test_split='tests'.* train, test"),
        ({"test_split": "train"}, r"data\.test_split must be another split than data\.train_split='train'"),
        ({"val_split": "train"}, r"data\.val_split must be another split"),
        ({"test_share": 0.95}, r"data\.val_share \+ data\.test_share must be less than 1"),
        ({"train_size": 46}, r"data\.train_size must be at most the 45"),
        ({"val_share": 0}, r"data\.val_share"),
        ({"max_length": 0}, r"data\.max_length"),
        ({"truncation_side": "middle"}, r"data\.truncation_side must be one of right, left"),
        ({"tokenizer": "/no/such/tokenizer"}, r"data\.tokenizer"),
    ],
)
def test_wrong_keys_are_named(folder, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        TextClassificationData(**{"path": folder, **options}).setup()
    assert "\n" not in str(caught.value)


def test_folder_without_data(tmp_path):
    (tmp_path / "notes.docx").write_text("x")
    with pytest.raises(ValueError, match=r"data\.path.*found: notes\.docx"):
        TextClassificationData(path=str(tmp_path)).setup()


WORDS = [f"text {i}" for i in range(20)]


@pytest.mark.parametrize(
    ("texts", "labels", "message"),
    [
        (WORDS, [-3, *[0, 1] * 9, 0], r"whole numbers from 0 or as text, it has -3"),
        (WORDS, [float("nan"), *[0.0, 1.0] * 9, 0.0], r"one class per row, it has none in 1 of"),
        (WORDS, [None, *["a", "b"] * 9, "a"], r"one class per row, it has none in 1 of"),
        (WORDS, [[0, 1]] * 20, r"one class per row, it holds list"),
        (WORDS, [1] * 20, r"two or more classes, the training split has only 1"),
        (WORDS, [f"id {i}" for i in range(20)], r"all 20 rows of the training split differ"),
        (list(range(20)), [0, 1] * 10, r"data\.text_column='text'.* must hold text, it holds int64"),
        ([None] * 20, [0, 1] * 10, r"must hold text, all \d+ rows of the train split are empty"),
        (["", " "] * 10, [0, 1] * 10, r"must hold text, all \d+ rows of the train split are empty"),
    ],
)
def test_data_that_cannot_be_meant_is_refused(tmp_path, texts, labels, message):
    datasets.Dataset.from_dict({"text": texts, "label": labels}).to_parquet(str(tmp_path / "all.parquet"))
    with pytest.raises(ValueError, match=message) as caught:
        TextClassificationData(path=str(tmp_path / "all.parquet")).setup()
    assert "data.path=" in str(caught.value)


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        ({"text": [*WORDS, None, ""], "label": [0, 1] * 11}, TEST, r"is empty in \d of \d+ rows of the train split"),
        (TRAIN, {key: values[:9] for key, values in TRAIN.items()}, r"\d of 9 texts of the test split are in the tr"),
        ({"text": WORDS, "label": [*range(19), 0]}, TEST, r"19 classes in 20 rows"),
        ({"text": WORDS, "label": [0, 1000] * 10}, {"text": ["x"], "label": [0]}, r"goes up to 1000 with 2 classes"),
    ],
)
def test_data_that_is_hardly_meant_is_warned_of(tmp_path, train, test, message):
    for name, split in {"train": train, "test": test}.items():
        datasets.Dataset.from_dict(split).to_parquet(str(tmp_path / f"{name}.parquet"))
    with pytest.warns(ConfigWarning, match=message):
        TextClassificationData(path=str(tmp_path)).setup()


def test_a_file_that_is_not_text_is_named_with_its_line(tmp_path):
    (tmp_path / "train.csv").write_bytes(b"text,label\ngood,1\n\xff\xfe,0\n")
    with pytest.raises(ValueError, match=r"data\.path: line 3 of .*train\.csv is not UTF-8 text"):
        TextClassificationData(path=str(tmp_path)).setup()


def test_split_without_labels(tmp_path):
    datasets.Dataset.from_dict(TRAIN).to_parquet(str(tmp_path / "train.parquet"))
    datasets.Dataset.from_dict({"text": ["x"], "label": [-1]}).to_parquet(str(tmp_path / "test.parquet"))
    with pytest.raises(ValueError, match=r"data\.label_column='label'.*label -1 in the test split"):
        TextClassificationData(path=str(tmp_path)).setup()
