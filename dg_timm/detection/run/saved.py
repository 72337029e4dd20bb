"""Evaluate a detector that was saved."""

import argparse
import json
import sys
import time
from pathlib import Path

from accelerate import Accelerator

from dg_timm._errors import BadValue
from dg_timm.analysis.counting import count_costs
from dg_timm.detection.data.boxes import Categories
from dg_timm.detection.evaluation import evaluate_detector
from dg_timm.detection.run.build import apply_run_options, check_extras, load_data, make_eval_loader
from dg_timm.detection.run.results import RESULT_FILES, class_table, write_results
from dg_timm.detection.saving import load_detector
from dg_timm.execution.settings import set_execution
from dg_timm.graph.stage import graph_stages
from dg_timm.training.loop.distributed import HostAllReduce, InterruptFlag
from dg_timm.training.run.lifecycle import RUN_FILES, check_unused


def evaluate_saved(args: argparse.Namespace, accelerator: Accelerator, stop: InterruptFlag) -> None:
    """Evaluate the detector of ``--evaluate``; print a JSON line and a table by class.

    With ``--output`` also write what a run writes of its best detector (:mod:`dg_timm.detection.run.results`).

    Raises:
        BadValue: the folder holds no detector, the data can't be used, or ``--output`` is in use.
        SystemExit: a signal came; nothing is printed or written, since the numbers would be those of a part.
    """
    check_extras(args)
    if args.output is not None:
        check_unused(Path(args.output), files=(*RUN_FILES, *RESULT_FILES))
    detector = load_detector(args.evaluate)
    known = Categories(detector.config["label_names"], detector.config["category_ids"])
    splits = load_data(args, accelerator, known)
    apply_run_options(detector, args)
    detector.to(accelerator.device)
    costs = None
    if graph_stages(detector):
        body, side = detector.backbone.body, detector.config["options"]["min_size"][-1]
        set_execution(body, args.execution)
        costs = count_costs(body, (3, side, side)) if args.execution == "dense" else None
    elif args.execution != "dense":
        raise BadValue(f"--execution {args.execution}: the backbone {detector.config['backbone']} is static")
    loader = make_eval_loader(splits.test, args, accelerator)
    start = time.perf_counter()
    result, found = evaluate_detector(
        detector,
        loader.epoch(0),
        splits.test,
        splits.categories,
        accelerator,
        lambda: stop.signal is not None,
        costs,
    )
    seconds = time.perf_counter() - start
    if HostAllReduce().any(stop.signal is not None):
        accelerator.print("stopped before all images were seen; nothing was written", file=sys.stderr)
        raise SystemExit(128 + int(stop.signal or 15))
    if not accelerator.is_main_process:
        return
    row = {"model": args.evaluate, "split": splits.test.name, "images": len(found), **result.overall}
    print(json.dumps({**row, "seconds": round(seconds, 2)}), flush=True)
    print(f"\n{class_table(result)}")
    if args.output is not None:
        write_results(
            Path(args.output),
            detector,
            splits.test,
            splits.categories,
            result,
            found,
            pictures=args.pictures,
            min_score=args.picture_score,
        )
