#!/usr/bin/env bash
# Makes a folder with all that benchmarks/accelerator.py needs on a machine without a
# network: wheels (Python 3.12, x86-64 Linux), the E2E text and a script that starts it.
#
#   bash launch/offline.sh launch/cuda_image.txt FOLDER_OF_E2E    # makes .offline/
#   bash .offline/run.sh OUT [flags of benchmarks/accelerator.py]  # on that machine
#
# The first argument is a file of the packages installed on that machine, one name or
# name==version per line, as `pip list --format=freeze` prints them.
set -euo pipefail
cd "$(dirname "$0")/.."
fail() {
  echo "error: $1" >&2
  exit 2
}

have=${1:-} data=${2:-} folder=${3:-.offline} most=45 # MiB
folder=${folder%/} mark=made_by_offline_sh
python=${PYTHON:-.venv/bin/python}
[ -f "$have" ] || fail "name a file that lists the other machine's packages, such as launch/cuda_image.txt"
for split in train valid; do
  [ -f "$data/src1_$split.txt" ] || fail "$data/src1_$split.txt: no such file; name the folder of the E2E data second"
done
command -v "$python" >/dev/null || fail "$python: no such program; run launch/test.sh first, or set PYTHON="
part=$folder.part
for old in "$folder" "$part"; do
  [ ! -e "$old" ] || [ -f "$old/$mark" ] || fail "$old is not of this script; name another folder third"
done
rm -rf "$part"
mkdir -p "$part/wheels" "$part/e2e"
touch "$part/$mark"
echo '*' > "$part/.gitignore"
trap 'rm -rf "$part"' EXIT

# The benchmark needs the package's requirements except those in LATER, which are only
# imported when they are used: other tokenizers, data sets, the grammar, text metrics.
"$python" - "$have" > "$part/missing.txt" << 'PY'
import configparser, json, re, subprocess, sys, tempfile

LATER = {"array-record", "nltk", "requests", "sacrebleu", "sentencepiece", "tensorflow-datasets"}
TARGET = ["--python-version=3.12", "--implementation=cp", "--only-binary=:all:"]
TARGET += [f"--platform=manylinux_2_{n}_x86_64" for n in (39, 35, 34, 31, 28, 27, 24, 17)]
TARGET += ["--platform=manylinux2014_x86_64", "--platform=manylinux1_x86_64"]


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", re.split(r"[\[=<>@ ]", name.strip())[0]).lower()


try:
    text = open(sys.argv[1], encoding="utf-8").read()
except (OSError, UnicodeDecodeError) as error:
    sys.exit(f"error: {sys.argv[1]}: {error}; give a list of packages as text")
# no index has vendor versions such as 0.11.2+cuda13
lines = [line.split("#")[0].split("+")[0].strip() for line in text.splitlines()]
have = {plain(line) for line in lines if line}
setup = configparser.RawConfigParser()
setup.read("setup.cfg", encoding="utf-8")
needed = setup["options"]["install_requires"].split()
needed = [name for name in needed if plain(name) not in LATER]
with tempfile.NamedTemporaryFile("w", suffix=".txt") as pins, tempfile.TemporaryDirectory() as away:
    pins.write("\n".join(line for line in lines if "==" in line))
    pins.flush()
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"]
    command += ["--report=-", f"--target={away}", f"--constraint={pins.name}", *TARGET, *needed]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8")
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no word"])[-1]
        sys.exit(f"error: {sys.argv[1]}: no wheels fit its versions ({last}); leave some out")
    report = json.loads(done.stdout)
for item in report["install"]:
    if plain(item["metadata"]["name"]) not in have:
        print(f"{item['metadata']['name']}=={item['metadata']['version']}")
PY

if [ -s "$part/missing.txt" ]; then
  platforms=()
  for n in 39 35 34 31 28 27 24 17; do platforms+=(--platform "manylinux_2_${n}_x86_64"); done
  "$python" -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 \
    --implementation cp "${platforms[@]}" --platform manylinux2014_x86_64 \
    --platform manylinux1_x86_64 -d "$part/wheels" -r "$part/missing.txt"
fi
for split in train valid; do
  gzip -9 --no-name --stdout "$data/src1_$split.txt" > "$part/e2e/src1_$split.txt.gz"
done

cat > "$part/run.sh" << 'SH'
#!/usr/bin/env bash
# Runs benchmarks/accelerator.py of the repository around this folder, offline:
#   bash run.sh OUT [flags of benchmarks/accelerator.py]
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
if [ $# = 0 ]; then
  echo "error: name a folder for the results first" >&2
  exit 2
fi
out=$1
shift
python=${PYTHON:-python3}
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
for wheel in "$here"/wheels/*.whl; do
  [ ! -e "$wheel" ] || "$python" -m zipfile -e "$wheel" "$site/packages"
done
mkdir "$site/e2e"
for file in "$here"/e2e/*.gz; do gunzip --stdout "$file" > "$site/e2e/$(basename "$file" .gz)"; done
root=${DLM_ROOT:-$here/..}
export PYTHONPATH=$site/packages:$root${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
"$python" "$root/benchmarks/accelerator.py" --out "$out" --data "$site/e2e" "$@" &
trap 'kill $! 2>/dev/null' TERM INT
status=0
wait $! || status=$?
wait $! 2>/dev/null || true # after a signal, wait until it has ended
exit "$status"
SH

size=$(du -sk "$part" | cut -f1)
[ "$size" -le $((most * 1024)) ] || fail "the folder would have $((size / 1024)) MiB, over $most: list more of what the other machine has"
rm -rf "$folder"
mv "$part" "$folder"
echo "$folder: $((size / 1024)) MiB; missing there: $(tr '\n' ' ' < "$folder/missing.txt")"
