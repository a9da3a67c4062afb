"""How long real texts are, in BERT's tokens: 23 public data sets as figures.

Lengths count [CLS] and [SEP], tokenised with the vocabulary of bert-base-uncased. `sample` draws lengths that have the
same distribution, so that a benchmark needs no data set; between two quantiles it interpolates.
"""

import numpy as np

LEVELS = (0, 5, 10, 20, 30, 40, 50, 60, 70, 80, 90, 95, 99, 100)  # percent

# name: (number of texts, mean, the quantiles at LEVELS)
DATASETS = {
    "sst2_train": (67349, 13.3, (3, 4, 4, 6, 7, 8, 10, 13, 16, 20, 27, 33, 44, 66)),
    "sst2_dev": (872, 25.2, (4, 10, 12, 16, 19, 21, 25, 27, 30, 34, 40, 44, 51, 55)),
    "cola_train": (8551, 11.3, (4, 6, 7, 8, 9, 10, 10, 11, 12, 14, 17, 20, 25, 47)),
    "mrpc_train_pairs": (3667, 53.2, (19, 32, 36, 41, 45, 50, 53, 57, 61, 64, 70, 74, 83, 103)),
    "rte_train_pairs": (2490, 70.2, (13, 29, 33, 40, 45, 50, 56, 62, 72, 103, 135, 157, 197, 289)),
    "stsb_train_pairs": (5749, 27.8, (10, 15, 16, 18, 19, 21, 23, 25, 28, 35, 51, 60, 75, 125)),
    "qnli_dev_pairs": (5463, 51.1, (15, 27, 31, 36, 40, 44, 48, 52, 57, 63, 75, 87, 116, 250)),
    "ag_news_test": (7600, 43.4, (8, 24, 28, 32, 35, 38, 41, 44, 47, 51, 57, 67, 117, 279)),
    "ag_news_dev": (10001, 43.9, (9, 24, 28, 32, 36, 38, 41, 44, 47, 51, 58, 71, 120, 354)),
    "squad_v1.1_dev_contexts": (2067, 161.6, (32, 74, 98, 113, 124, 135, 148, 162, 179, 201, 243, 280, 416, 791)),
    "squad_v1.1_dev_question_context_pairs": (10570, 176.6, (41, 88, 109, 127, 138, 149, 163, 177, 195, 218, 262, 299, 444, 819)),  # noqa: E501
    "squad_v1.1_dev_questions": (10570, 14.6, (6, 9, 10, 11, 12, 13, 14, 15, 16, 18, 20, 22, 27, 40)),
    "wikitext2_valid_paragraphs": (1841, 140.5, (3, 12, 24, 58, 86, 109, 133, 155, 182, 213, 261, 300, 381, 532)),
    "wikitext2_test_paragraphs": (2185, 136.1, (3, 7, 13, 44, 79, 103, 124, 149, 176, 211, 265, 314, 415, 585)),
    "enwiki2015_paragraphs_6files": (12862, 102.3, (7, 14, 22, 41, 58, 74, 90, 107, 128, 153, 196, 235, 328, 633)),
    "enwiki2015_documents_6files": (298, 4388.3, (4, 16, 88, 466, 1082, 1821, 2838, 4227, 5533, 7951, 11496, 13973, 17799, 20040)),  # noqa: E501
    "conll2003_train_sentences": (14041, 20.0, (3, 6, 7, 9, 11, 13, 15, 19, 25, 32, 40, 45, 56, 164)),
    "banking77_train": (10003, 16.2, (4, 8, 9, 10, 11, 12, 13, 15, 16, 19, 28, 37, 53, 98)),
    "clinc150_train": (15000, 11.0, (3, 6, 7, 8, 9, 10, 11, 11, 12, 14, 16, 18, 21, 33)),
    "snips_train": (13084, 12.0, (4, 7, 8, 9, 10, 11, 12, 12, 14, 15, 17, 19, 23, 38)),
    "rt_polarity": (10662, 27.4, (3, 10, 13, 17, 21, 24, 27, 30, 33, 37, 43, 48, 56, 84)),
    "semeval2010_t8_train": (8000, 23.2, (6, 11, 13, 15, 17, 20, 22, 24, 27, 30, 35, 40, 54, 123)),
    "bbc_articles": (2225, 486.7, (108, 213, 246, 294, 335, 376, 421, 483, 557, 636, 774, 913, 1240, 5303)),
}  # fmt: skip


def sample(name: str, count: int, longest: int = 512, seed: int = 0) -> np.ndarray:
    """[count] lengths, none above `longest` (where a tokenizer would cut).

    Args:
        name: of `DATASETS`, or "full", "half" or "quarter": 100, 50 or 25 % of count x longest on average, uneven, and
            one of them as long as `longest`.
    Raises:
        ValueError: the name is not known.
    """
    rng = np.random.default_rng(seed)
    if name in ARTIFICIAL:
        return _filled(ARTIFICIAL[name], count, longest, rng)
    if name not in DATASETS:
        raise ValueError(f"lengths={name!r} is not one of {', '.join((*ARTIFICIAL, *DATASETS))}")
    drawn = np.interp(rng.random(count), np.array(LEVELS) / 100, DATASETS[name][2])
    return np.minimum(drawn.round().astype(int), longest)


ARTIFICIAL = {"full": 1.0, "half": 0.5, "quarter": 0.25}


def _filled(share: float, count: int, longest: int, rng) -> np.ndarray:
    if share == 1:
        return np.full(count, longest)
    # one is the longest, the others lie evenly around what is left for them
    mean = (share * count * longest - longest) / max(count - 1, 1)
    spread = min(mean - 1, longest - mean)
    others = rng.permutation(np.linspace(mean - spread, mean + spread, max(count - 1, 0)).round().astype(int))
    return rng.permutation(np.append(others.clip(1, longest), longest)[:count])
