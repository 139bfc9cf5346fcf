#!/usr/bin/env bash
# Has libFuzzer look for inputs that do harm, of every kind in turn, and keeps those recipes that go new ways, the
# fewest that go as many: `make test` cooks them. Ends where one does harm, and says where it lies. See src/mutants.rs.
#
#   tests/fuzz.sh SECONDS [TARGET ...]
set -euo pipefail
cd "$(dirname "$0")/.."

seconds=$1
shift
if ! cargo bolero --version >/dev/null 2>&1; then
	echo "make fuzz: cargo-bolero is missing: cargo install --locked cargo-bolero@0.13.5" >&2
	exit 1
fi
target=${CARGO_TARGET_DIR:-target}
work=$(realpath -m "$target/recipes")
if [[ $# -eq 0 ]]; then
	mapfile -t names < <(grep -rhoP 'name: "\K[a-z_]+' --include=fuzz_test.rs src | sort)
	set -- "${names[@]}"
fi

for name in "$@"; do
	kept=tests/fixtures/recipes/$name.txt
	# The test stands in the module whose file names its recipes.
	module=$(grep -rl "name: \"$name\"" --include=fuzz_test.rs src | sed 's|^src/||; s|\.rs$||; s|/|::|g')
	# run CORPUS OTHER ...: libFuzzer writes what is new into the first of the two folders.
	run() {
		cargo bolero test "$module::$name" --package denoised --features object-store --sanitizer NONE \
			--target-dir "$target/fuzz" --engine libfuzzer --max-input-length 64 \
			--corpus-dir "$1" --crashes-dir "$2" "${@:3}"
	}

	echo "make fuzz: $name, $seconds s"
	mkdir -p "$work/$name"
	while read -r recipe; do
		xxd -r -p <<<"$recipe" >"$work/$name/$(sha1sum <<<"$recipe" | cut -c 1-40)"
	done <"$kept"
	run "$work/$name" "$work/$name.harm" -T "${seconds}s"

	rm -rf "$work/$name.fewest"
	run "$work/$name.fewest" "$work/$name" -E=-merge=1
	for recipe in "$work/$name.fewest"/*; do
		xxd -p -c 0 "$recipe"
	done | sort >"$kept"
	echo "make fuzz: $name, $(wc -l <"$kept") recipes are kept"
done
