#!/usr/bin/env bash
# Has libFuzzer look for inputs that do harm, of every kind in turn, and keeps those recipes that go new ways, the
# fewest that go as many: `make test` cooks them. Ends where one does harm, and says where it lies. See src/mutants.rs.
#
#   tests/fuzz.sh SECONDS [TARGET ...]
set -euo pipefail
cd "$(dirname "$0")/.."

seconds=$1
shift
target=${CARGO_TARGET_DIR:-target}
work=$(realpath -m "$target/recipes")
if [[ $# -eq 0 ]]; then
	mapfile -t names < <(basename --suffix .txt --multiple tests/fixtures/recipes/*)
	set -- "${names[@]}"
fi

# As cargo-bolero does, which would also link the program, for which libFuzzer is not there. The flags are for a target
# that is named: macros and build scripts go without.
flags=(
	--cfg fuzzing --cfg fuzzing_libfuzzer -Cpasses=sancov-module
	-Cllvm-args=-sanitizer-coverage-{inline-8bit-counters,level=4,pc-table,trace-compares,stack-depth}
)
host=$(rustc -vV | sed -n 's/^host: //p')
program=$(
	RUSTFLAGS="${flags[*]}" BOLERO_FUZZER=libfuzzer cargo test --locked --package denoised --features object-store --lib \
		--no-run --profile fuzz --target "$host" --target-dir "$target/fuzz" --message-format json-render-diagnostics |
		sed -n 's/.*"executable":"\([^"]*\)".*/\1/p'
)

for name in "$@"; do
	kept=tests/fixtures/recipes/$name.txt
	# The test stands in the module whose file names its recipes.
	test=$(grep -rl "name: \"$name\"" --include=fuzz_test.rs src | sed 's|^src/||; s|\.rs$||; s|/|::|g')::$name
	run() {
		BOLERO_LIBFUZZER_ARGS="$*" BOLERO_TEST_NAME=$test BOLERO_LIBTEST_HARNESS=1 \
			"$program" "$test" --exact --nocapture --quiet --test-threads 1
	}

	echo "make fuzz: $name, $seconds s"
	mkdir -p "$work/$name" "$work/$name.harm"
	while read -r recipe; do
		xxd -r -p <<<"$recipe" >"$work/$name/$(sha1sum <<<"$recipe" | cut -c 1-40)"
	done <"$kept"
	run "$work/$name" -artifact_prefix="$work/$name.harm/" -max_total_time="$seconds" -max_len=64 -timeout=10

	rm -rf "$work/$name.fewest"
	mkdir "$work/$name.fewest"
	run -set_cover_merge=1 -max_len=64 "$work/$name.fewest" "$work/$name"
	for recipe in "$work/$name.fewest"/*; do
		xxd -p -c 0 "$recipe"
	done | sort >"$kept"
	echo "make fuzz: $name, $(wc -l <"$kept") recipes are kept"
done
