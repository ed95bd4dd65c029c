"""`fastattn finetune` on a table of one's own, then `fastattn predict`, here called from Python.

On the command line:
    fastattn finetune --data reviews.csv --text-column review --label-column verdict --out runs/reviews
    fastattn predict runs/reviews/model "a lovely little film"
"""

import csv
import tempfile
from pathlib import Path

from fastattn.cli import main
from fastattn.finetune.datasets import load_task

with tempfile.TemporaryDirectory() as directory:
    table = Path(directory) / "reviews.csv"
    reviews = load_task("sentiment").train
    names = load_task("sentiment").label_names
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["review", "verdict"])
        writer.writerows([reviews.texts[i], names[reviews.labels[i]]] for i in range(0, len(reviews), 20))

    out = str(Path(directory) / "run")
    columns = ["--text-column", "review", "--label-column", "verdict"]
    main(["finetune", "--data", str(table), *columns, "--steps", "40", "--out", out])
    main(["predict", f"{out}/model", "a lovely little film", "tedious from beginning to end"])
