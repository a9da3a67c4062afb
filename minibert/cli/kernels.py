"""The verb that looks into the kernels: xray."""

from typing import Annotated


def xray(
    *,
    only: Annotated[str, 'a pattern of "op direction plan", as the table has them'] = "",
    arch: Annotated[list[int], "80, 90, 100, 120; by default all, or that of --gpu"] = None,
    gpu: Annotated[str | None, "predict times on a100, rtx4090, l40s, h100, h100-pcie, h200, b200 or rtx5090"] = None,
    step: Annotated[list[str], "predict training steps of bert-base, bert-large"] = None,
    lengths: Annotated[list[int], "tokens of a sequence of --step, by default 128 and 512"] = None,
    tokens: Annotated[int, "tokens of a --step"] = 65536,
    matrix_share: Annotated[float, "share of the matrix peak that is reached"] = 0.7,
    ptx: Annotated[str | None, "print the PTX of the kernels that match this pattern"] = None,
    sass: Annotated[str | None, "print their machine code"] = None,
    diff: Annotated[str | None, "say what changed since this output of --json"] = None,
    limits: Annotated[str | None, "a file to take the place of xray_limits.json"] = None,
    launches: Annotated[bool, "also the variants that steps of BERT-base launch, as recorded"] = False,
    processes: Annotated[int | None, "compile with this many, by default one a core"] = None,
    markdown: Annotated[bool, "print the tables of kernels/README.md"] = False,
    json: Annotated[bool, "print one object: versions, rows and steps"] = False,
) -> int:
    """What the compiler makes of each kernel, and what it must cost, without a GPU; 1 where a limit is broken.

    Example: minibert xray --gpu h200 --only "attention.*d=64"
    """
    from minibert_kernels.xray import run

    from ..profile.launches import bert_base

    return run(
        only=only, arch=arch, gpu=gpu, step=step, lengths=lengths, tokens=tokens, matrix_share=matrix_share, ptx=ptx,
        sass=sass, diff_with=diff, limits=limits, processes=processes, as_markdown=markdown, as_json=json,
        launches=bert_base if launches else None,
    )  # fmt: skip
