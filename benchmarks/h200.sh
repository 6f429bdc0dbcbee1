#!/bin/bash
# The H200's rows of docs/performance.md, and where vLLM is installed SAISA beside LLaVA in it: bash benchmarks/h200.sh FOLDER
#
# Results come into FOLDER: h200.json, h200.txt, serving.json, serving.txt. Fill the page with
# python scripts/performance.py h200=FOLDER/h200.json
#
# Under eight minutes, by estimate: the rows take a minute of arithmetic at 400 TFLOP/s (24 PFLOPs), and two to three with
# the making of the models and starts; serving takes three, two engines of about a minute each and rounds of a few seconds,
# and is given up after four.
set -euo pipefail
folder=${1:?"usage: bash benchmarks/h200.sh FOLDER"}
cd "$(dirname "$0")/.."
mkdir -p "$folder"
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}"
python=${PYTHON:-python}
"$python" -m saisa_hf bench --targets h200 --device cuda --json "$folder/h200.json" | tee "$folder/h200.txt"
if "$python" -c "import vllm" 2> /dev/null; then
    timeout 240 "$python" benchmarks/serving.py --width 4096 --layers 8 --output "$folder/serving.json" \
        | tee "$folder/serving.txt"
else
    echo "vLLM is not installed: serving is left out."
fi
