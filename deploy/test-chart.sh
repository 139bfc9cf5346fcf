#!/usr/bin/env bash
# Tests of the Helm chart that need no cluster: lint, render, validate against the schemas of
# Kubernetes, and refuse bad values. Needs helm and kubernetes-validate (`make test-tools`); a test
# whose tool is missing is skipped by name and counted as skipped, never as passed.
set -euo pipefail

cd "$(dirname "$0")"
chart=chart
all_on="chart-values/repository-and-autoscaling.yaml"
kubernetes_versions=(1.31.0 1.34.0 1.37.0)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

passed=0 failed=0 skipped=0

have() { command -v "$1" >/dev/null; }

# check "WHAT" COMMAND...: one test, whose output is shown only when it fails.
check() {
    local what=$1
    shift
    if "$@" >"$work/output" 2>&1; then
        passed=$((passed + 1))
        echo "chart: ok       $what"
    else
        failed=$((failed + 1))
        echo "chart: FAILED   $what"
        sed 's/^/    /' "$work/output"
    fi
}

# skip TOOL "WHAT" N: N tests not run, because the tool is missing.
skip() {
    skipped=$((skipped + $3))
    echo "chart: SKIPPED  $2: $1 is missing (make test-tools)" >&2
}

# refuses "FIELD" ARGS...: rendering must fail, and the message must name the field.
refuses() {
    local field=$1
    shift
    if helm template denoised "$chart" "$@"; then
        echo "rendered, but should have been refused"
        return 1
    fi >"$work/refusal" 2>&1
    grep -F "$field" "$work/refusal" >/dev/null || { cat "$work/refusal"; return 1; }
}

# rendered FILE "TEXT": the manifest has a line that holds the text.
rendered() {
    grep -F -- "$2" "$1" >/dev/null || { echo "no line with: $2"; return 1; }
}

absent() {
    ! grep -F -- "$2" "$1"
}

# One document a file: that is what kubernetes-validate takes.
render() {
    mkdir -p "$2" &&
        helm template denoised "$chart" --namespace inference --values "$1" >"$2.yaml" &&
        awk -v folder="$2" '/^---/ { n++; next } { print > (folder "/" n ".yaml") }' "$2.yaml"
}

if have helm; then
    check "lint, default values" helm lint --strict "$chart"
    check "lint, everything on" helm lint --strict "$chart" --values "$all_on"
    check "render, default values" render "$chart/values.yaml" "$work/defaults"
    check "render, everything on" render "$all_on" "$work/all-on"
    check "render, TLS" render "chart-values/tls.yaml" "$work/tls"
    check "render, object store" render "chart-values/store.yaml" "$work/store"

    check "defaults: no autoscaler" absent "$work/defaults.yaml" "kind: HorizontalPodAutoscaler"
    check "defaults: no volume" absent "$work/defaults.yaml" "volumeMounts"
    check "defaults: the grace period covers sleep and drain" \
        rendered "$work/defaults.yaml" "terminationGracePeriodSeconds: 35"
    check "everything on: the grace period follows the drain" \
        rendered "$work/all-on.yaml" "terminationGracePeriodSeconds: 105"
    check "everything on: the repository is mounted" rendered "$work/all-on.yaml" "claimName: \"model-repository\""
    check "everything on: autoscaler" rendered "$work/all-on.yaml" "kind: HorizontalPodAutoscaler"
    check "everything on: replicas are the autoscaler's" absent "$work/all-on.yaml" "  replicas:"

    check "defaults: probes speak gRPC" rendered "$work/defaults.yaml" "grpc:"
    check "defaults: the port is h2c" rendered "$work/defaults.yaml" "appProtocol: kubernetes.io/h2c"
    check "TLS: the certificate is mounted" rendered "$work/tls.yaml" "secretName: \"denoised-tls\""
    check "TLS: probes speak HTTPS" rendered "$work/tls.yaml" "scheme: HTTPS"
    check "TLS: probes do not speak gRPC" absent "$work/tls.yaml" "grpc:"
    check "TLS: the port is not h2c" absent "$work/tls.yaml" "h2c"
    check "TLS: clients need no certificate" absent "$work/tls.yaml" "TLS_CLIENT_CA"
    check "everything on: clients need certificates" rendered "$work/all-on.yaml" "value: /tls/ca.crt"
    check "everything on: probes have no certificate to show" absent "$work/all-on.yaml" "httpGet"
    check "everything on: tokens" rendered "$work/all-on.yaml" "value: /tokens/tokens.toml"
    check "refused: clients' certificates without the server's" refuses "tlsSecret" --set server.tlsClients=true

    check "object store: it is the repository" rendered "$work/store.yaml" "value: \"s3://bucket/models\""
    check "object store: there is a cache" rendered "$work/store.yaml" "value: /cache/models"
    check "object store: the cache is bounded" rendered "$work/store.yaml" "value: \"5120\""
    check "object store: credentials come from the secret" rendered "$work/store.yaml" "name: \"bucket-credentials\""
    check "refused: two repositories" refuses "one repository" \
        --set models.existingClaim=models,models.store=s3://bucket/models

    check "refused: no worker" refuses "workers" --set engine.workers=0
    check "refused: unknown log format" refuses "format" --set log.format=xml
    check "refused: a misspelt key" refuses "drainGrace" --set server.drainGrace=5
    check "refused: a privileged port" refuses "port" --set server.port=80
    check "refused: text where a number belongs" refuses "drainGraceSeconds" --set-string server.drainGraceSeconds=20s
    check "refused: no CPU request, which the autoscaler needs" refuses "cpu" --set resources.requests.cpu=null
    check "refused: headless and a load balancer at once" refuses "type" --set service.headless=true,service.type=LoadBalancer
    check "refused: fewer replicas at most than at least" \
        refuses "autoscaling.minReplicas" --set autoscaling.enabled=true,autoscaling.minReplicas=9
else
    skip helm "lint, render, refuse" 37
fi

# The validator itself must be able to say no.
refuses_a_misspelt_field() {
    sed 's/readinessProbe:/readynessProbe:/' "$work/defaults.yaml" >"$work/misspelt.yaml"
    awk -v file="$work/misspelt-deployment.yaml" '/^---/ { n++; next } n == 3 { print > file }' "$work/misspelt.yaml"
    if kubernetes-validate --strict -k "$1" "$work/misspelt-deployment.yaml" >"$work/refusal" 2>&1; then
        echo "accepted a field that does not exist"
        return 1
    fi
    grep -F readynessProbe "$work/refusal" >/dev/null || { cat "$work/refusal"; return 1; }
}

for version in "${kubernetes_versions[@]}"; do
    if ! have helm; then
        skip helm "validate against Kubernetes $version" 5
    elif ! have kubernetes-validate; then
        skip kubernetes-validate "validate against Kubernetes $version" 5
    else
        for values in defaults all-on tls store; do
            check "valid in Kubernetes $version: $values" \
                kubernetes-validate --strict -k "$version" "$work/$values"/*.yaml
        done
        check "refused in Kubernetes $version: a misspelt field" refuses_a_misspelt_field "$version"
    fi
done

echo "chart: $passed passed, $failed failed, $skipped skipped"
((failed == 0))
