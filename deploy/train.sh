#!/usr/bin/env bash
# From text to a served model, in one command that may be killed anywhere and started again on another machine: prepares the
# text, trains with a mirror, exports and publishes. What is done is found in the mirror and the repository, not on the disk.
#   deploy/train.sh RUN.toml NAME REPOSITORY TEXT...
# The run's file says where the mirror is (run.mirror, or TRAINING__RUN__MIRROR); REPOSITORY is a folder or an object store,
# such as s3://bucket/models, which servers watch. TEXT are files or folders of text.
#   WORK          where files lie meanwhile (default: a temporary folder)
#   VOCABULARY    tokens of the tokenizer that is made, where the run's file names none that is there (default: 8191)
#   EXPORT        options of `training export` (default: --storage f16)
set -euo pipefail

run=${1:?usage: train.sh RUN.toml NAME REPOSITORY TEXT...}
name=${2:?}
repository=${3:?}
shift 3
work=${WORK:-$(mktemp -d)}
mkdir -p "$work"

# The same text gives the same tokenizer and the same tokens, wherever it is done.
tokenizer=$work/tokenizer.json
if [[ ! -e $tokenizer ]]; then
    training tokenizer --vocab-size "${VOCABULARY:-8191}" --out "$tokenizer.new" "$@"
    mv "$tokenizer.new" "$tokenizer"
fi
training prepare --tokenizer "$tokenizer" --out "$work/tokens" "$@"

export TRAINING__DATA__TRAIN=$work/tokens/train.tokens
export TRAINING__DATA__VALIDATION=$work/tokens/validation.tokens
export TRAINING__DATA__TOKENIZER=$tokenizer
export TRAINING__RUN__DIRECTORY=$work/run
# A signal is for fit, which saves then and ends well: nothing that is not trained to its end may be published.
stopped='' fit=''
trap 'stopped=1; [[ -z $fit ]] || kill -TERM "$fit" 2>/dev/null || true' TERM INT
training fit "$run" --resume-if-any &
fit=$!
status=0
wait "$fit" || status=$?
if [[ -n $stopped ]]; then
    wait "$fit" || true
    echo "train.sh: stopped by a signal; started again it goes on" >&2
    exit 143
fi
((status == 0)) || exit "$status"
trap - TERM INT

rm -rf "$work/bundle"
# shellcheck disable=SC2086
training export "$run" ${EXPORT:---storage f16} --name "$name" --out "$work/bundle"
training publish "$work/bundle" "$repository" --unless-there
