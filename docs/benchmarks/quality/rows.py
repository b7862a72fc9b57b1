"""The rows of the table: a name, what it is, and how it is made.  Add a row here.

A qtool row is the options of `qtool quantize`.  STATISTICS and DIAGONAL in them stand for what `qtool
calibrate` measured on the calibration text, in one pass over the original model; TEXT for the text itself,
measured anew block by block behind quantized blocks (sequential).  A script row is a script of this folder with its options.
BARS are the figures that rows are held to.
"""

from dataclasses import dataclass

STATISTICS, DIAGONAL, TEXT = "{statistics}", "{diagonal}", "{text}"  # replaced by paths
MEASURED = {STATISTICS: (), DIAGONAL: ("--diagonal",)}  # options of `qtool calibrate`
WITH_CALIB = ("--calib", STATISTICS)
GPTQ = (*WITH_CALIB, "--method", "gptq")
SEQUENTIAL = ("--calib", TEXT)
AWQ = (*WITH_CALIB, "--awq", "--method", "mse")
AWQ_GPTQ = (*WITH_CALIB, "--awq", "--method", "gptq")
CCQ = (*WITH_CALIB, "--method", "ccq")
ZERO_POINT = ("--asymmetric", "--scale-dtype", "f16")


@dataclass(frozen=True)
class Row:
    name: str  # unique; results are kept under it
    label: str
    quantize: tuple = ()  # options of `qtool quantize`
    script: tuple = ()  # or: a script of this folder and its options


def qtool(name, label, *options):
    return Row(name, label, quantize=options)


def llama(kind, *options):
    name = "llama-" + kind.lower().replace("_", "") + ("-plain" if options else "")
    how = "without imatrix" if options else "with imatrix"
    return Row(name, f"llama.cpp {kind}, flat, {how}", script=("flat_gguf.py", "--type", kind, *options))


def bits8():
    yield qtool("rtn8", "RTN INT8", "--bits", "8")
    yield qtool("mse8", "MSE clip INT8", "--bits", "8", "--clip", "mse")
    yield qtool("gptq8", "GPTQ INT8", "--bits", "8", *GPTQ)
    yield qtool("gptq8-sequential", "GPTQ INT8, sequential", "--bits", "8", *SEQUENTIAL)
    yield qtool("awq8", "AWQ INT8", "--bits", "8", *AWQ)
    yield qtool("rotate8", "GPTQ INT8, rotated", "--bits", "8", *GPTQ, "--rotate")
    yield llama("Q8_0")


def bits4():
    grids = [
        ("g64", "INT4 g64", ("--bits", "4")),
        ("g32", "INT4 g32", ("--bits", "4", "--group-size", "32")),
        ("g32zp", "INT4 g32 zero point", ("--bits", "4", "--group-size", "32", *ZERO_POINT)),
    ]
    methods = [
        ("rtn4", "RTN", ("--clip", "none")),
        ("mse4", "MSE clip", ("--clip", "mse")),
        ("wmse4", "MSE clip, weighted by inputs", (*WITH_CALIB, "--method", "mse")),
        ("gptq4", "GPTQ", GPTQ),
        ("awq4", "AWQ", AWQ),
        ("awqgptq4", "AWQ and GPTQ", AWQ_GPTQ),
    ]
    for method, method_label, method_options in methods:
        for grid, grid_label, grid_options in grids:
            yield qtool(f"{method}-{grid}", f"{method_label} {grid_label}", *grid_options, *method_options)
    for grid, grid_label, grid_options in (grids[0], grids[2]):
        label = f"GPTQ {grid_label}, sequential"
        yield qtool(f"gptq4-{grid}-sequential", label, *grid_options, *SEQUENTIAL)
    for grid, grid_label, grid_options in (grids[0], grids[2]):
        label = f"GPTQ {grid_label}, rotated"
        yield qtool(f"rotate4-{grid}", label, *grid_options, *GPTQ, "--rotate")
        yield qtool(f"rotateawq4-{grid}", f"AWQ and {label}", *grid_options, *AWQ_GPTQ, "--rotate")
    yield qtool("qtool-nf4", "NF4", "--bits", "4", "--method", "nf4")
    yield Row("nf4", "NF4, double quantization (bitsandbytes)", script=("nf4.py",))
    yield llama("Q4_K")
    yield llama("Q4_K", "--no-importance")
    yield llama("IQ4_XS")


def bits3():
    yield llama("Q3_K")
    yield llama("IQ3_XXS")


def bits2():
    plain = ("--bits", "2", "--group-size", "64")
    for end, label, grid in (("", "INT2 g64", plain), ("-zp", "INT2 g64 zero point", (*plain, *ZERO_POINT))):
        yield qtool(f"rtn2{end}", f"RTN {label}", *grid, "--method", "none")
        yield qtool(f"mse2{end}", f"MSE clip {label}", *grid, "--method", "mse")
        yield qtool(f"gptq2{end}", f"GPTQ {label}", *grid, *GPTQ)
        yield qtool(f"awq2{end}", f"AWQ {label}", *grid, *AWQ)
    yield qtool("rotate2-zp", "GPTQ INT2 g64 zero point, rotated", *plain, *ZERO_POINT, *GPTQ, "--rotate")
    wint2 = ("--bits", "2")
    yield qtool("ccq", "ccq (WINT2), data-free", *wint2)
    yield qtool("ccq-diagonal", "ccq, diagonal", *wint2, "--calib", DIAGONAL)
    yield qtool("ccq-full", "ccq, full Hessian", *wint2, *CCQ)
    yield qtool("ccq-best", "ccq, full Hessian, effort best", *wint2, *CCQ, "--effort", "best")
    yield qtool("ccq-sequential", "ccq, full Hessian, sequential", *wint2, *SEQUENTIAL)
    yield qtool("ccq-rotate", "ccq, full Hessian, rotated", *wint2, *CCQ, "--rotate")
    yield qtool("ccq-awq", "ccq, full Hessian, scaled (awq)", *wint2, *CCQ, "--awq")
    yield qtool("ccq-rotate-awq", "ccq, full Hessian, rotated and scaled", *wint2, *CCQ, "--rotate", "--awq")
    yield qtool("ccq-rotate-sequential", "ccq, full Hessian, rotated, sequential", *wint2, *SEQUENTIAL, "--rotate")
    yield qtool("ccq25", "ccq25 (WINT2.5), full Hessian", *wint2, *WITH_CALIB, "--method", "ccq25")
    for kind in ("Q2_K", "IQ2_S", "IQ2_XS", "IQ2_XXS"):
        yield llama(kind)


def mixed():
    for bits in ("2.5", "3", "4"):
        name = f"target-{bits}"
        yield qtool(name, f"--target-bpw {bits}", *WITH_CALIB, "--target-bpw", bits)


ROWS = [*bits8(), *bits4(), *bits3(), *bits2(), *mixed()]


@dataclass(frozen=True)
class Bar:
    """`figure` of `row` is at most `limit`, or at most `limit` times that of the row `times`."""

    row: str
    limit: float
    times: str = ""
    figure: str = "kl_mean"


BARS = [
    Bar("gptq8", 0.0030),
    Bar("gptq4-g64", 0.15),
    Bar("gptq4-g32zp", 0.09),
    Bar("ccq-full", 0.40, times="ccq"),
    Bar("ccq-full", 1.71),
    Bar("ccq-full", 1.3),
    Bar("ccq-rotate", 1.1),
    Bar("target-3", 0.60),
]
# Of calibrating and quantizing together.
SECONDS = Bar("ccq-sequential", 15 * 60, figure="seconds")
MEMORY = Bar("ccq-sequential", 2e9, figure="peak_anonymous")
