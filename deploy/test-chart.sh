#!/usr/bin/env bash
# Tests of the Helm chart that need no cluster: lint, render, validate against the schemas of
# Kubernetes, and refuse bad values. Needs helm and kubernetes-validate (`make test-tools`); a test
# whose tool is missing is skipped by name and counted as skipped, never as passed.
set -euo pipefail

cd "$(dirname "$0")"
chart=chart
all_on="chart-values/repository-and-autoscaling.yaml"
kubernetes_versions=(1.31.0 1.34.0 1.37.0)
packages=../.tools/node/node_modules
python=../.tools/python/bin/python
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

# One document a file: that is what kubernetes-validate takes, and only of what Kubernetes itself has.
render() {
    local name=$1
    shift
    mkdir -p "$work/$name" "$work/$name-custom" || return
    helm template denoised "$chart" --namespace inference "${@/#/--values=}" >"$work/$name.yaml" || return
    awk -v folder="$work/$name" '/^---/ { n++; next } { print > (folder "/" n ".yaml") }' "$work/$name.yaml"
    local file
    for file in "$work/$name"/*.yaml; do
        if grep -qE '^apiVersion: .*(gateway|inference)\.networking\.k8s\.io|keda\.sh|monitoring\.coreos|cert-manager' "$file"; then
            mv "$file" "$work/$name-custom/"
        fi
    done
}

# Custom resources, against the schemas that their makers publish.
custom_resources_are_valid() {
    "$python" -c 'import json, sys, yaml; print(json.dumps([d for f in sys.argv[1:] for d in yaml.safe_load_all(open(f)) if d]))' \
        "$@" | node ../tests/tools/custom_resources.mjs "$packages"
}

refuses_a_route_without_a_parent() {
    sed 's/- name: gateway$/- nane: gateway/' "$(grep -l 'kind: GRPCRoute' "$work/certificates-custom"/*.yaml)" \
        >"$work/wrong-route.yaml"
    if custom_resources_are_valid "$work/wrong-route.yaml" >"$work/refusal" 2>&1; then
        echo "accepted"
        return 1
    fi
    grep -F "GRPCRoute denoised: data/spec/parentRefs/0 must have required property name" "$work/refusal" >/dev/null ||
        { cat "$work/refusal"; return 1; }
}

# The kustomize base is what the chart renders.
base_is_rendered() {
    diff <(kustomize_base) kustomize/denoised.yaml || { echo "make kustomize-base"; return 1; }
}
kustomize_base() { helm template denoised "$chart" --namespace denoised | grep -v '^# Source'; }

if have helm; then
    check "lint, default values" helm lint --strict "$chart"
    check "lint, everything on" helm lint --strict "$chart" --values "$all_on"
    check "render, default values" render defaults "$chart/values.yaml"
    check "render, everything on" render all-on "$all_on"
    check "render, TLS" render tls "chart-values/tls.yaml"
    check "render, object store" render store "chart-values/store.yaml"
    check "render, gateway" render gateway "chart-values/gateway.yaml"
    check "render, certificates" render certificates "chart-values/certificates.yaml"
    check "render, CPUs" render cpu "$chart/values-cpu.yaml"
    check "render, GPUs" render gpu "$chart/values-gpu.yaml"
    check "render, CPUs that go away" render spot "$chart/values-cpu.yaml" "$chart/values-spot.yaml"

    check "defaults: no autoscaler" absent "$work/defaults.yaml" "kind: HorizontalPodAutoscaler"
    check "defaults: no volume" absent "$work/defaults.yaml" "volumeMounts"
    check "defaults: the grace period covers sleep and drain" \
        rendered "$work/defaults.yaml" "terminationGracePeriodSeconds: 35"
    check "everything on: the grace period follows the drain" \
        rendered "$work/all-on.yaml" "terminationGracePeriodSeconds: 105"
    check "everything on: the repository is mounted" rendered "$work/all-on.yaml" "claimName: \"model-repository\""
    check "everything on: prepared networks" rendered "$work/all-on.yaml" "value: /prepared"
    check "everything on: prepared networks are bounded" rendered "$work/all-on.yaml" "value: \"4096\""
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
    check "refused: clients' certificates without the server's" refuses "server.tlsClients" --set server.tlsClients=true

    check "object store: it is the repository" rendered "$work/store.yaml" "value: \"s3://bucket/models\""
    check "object store: there is a cache" rendered "$work/store.yaml" "value: /cache/models"
    check "object store: the cache is bounded" rendered "$work/store.yaml" "value: \"5120\""
    check "object store: credentials come from the secret" rendered "$work/store.yaml" "name: \"bucket-credentials\""
    check "refused: two repositories" refuses "one repository" \
        --set models.existingClaim=models,models.store=s3://bucket/models

    check "defaults: a disruption budget" rendered "$work/defaults.yaml" "unhealthyPodEvictionPolicy: AlwaysAllow"
    check "defaults: spread over zones" rendered "$work/defaults.yaml" "topologyKey: topology.kubernetes.io/zone"
    check "everything on: a service that resolves to every pod" rendered "$work/all-on.yaml" "name: denoised-headless"
    check "gateway: models are an image" rendered "$work/gateway.yaml" 'reference: "registry.example.com/models:7"'
    check "gateway: the route leads to the pool" rendered "$work/gateway.yaml" "kind: HTTPRoute"
    check "gateway: pods say which metrics they have" rendered "$work/gateway.yaml" "llm-d.ai/engine-type: denoised"
    check "gateway: the pool speaks h2c" rendered "$work/gateway.yaml" "  appProtocol: kubernetes.io/h2c"
    check "gateway: KEDA's replicas" absent "$work/gateway.yaml" "  replicas:"
    check "gateway: pods call a collector only" absent "$work/gateway.yaml" "port: 443"
    check "certificates: a route for gRPC" rendered "$work/certificates.yaml" "kind: GRPCRoute"
    check "certificates: the gateway checks them" rendered "$work/certificates.yaml" "kind: BackendTLSPolicy"
    check "certificates: the server has cert-manager's" rendered "$work/certificates.yaml" 'secretName: "denoised-tls"'
    check "certificates: the autoscaler counts seconds of work" \
        rendered "$work/certificates.yaml" "name: denoised_queued_seconds"
    check "GPUs: a GPU" rendered "$work/gpu.yaml" "nvidia.com/gpu: 1"
    check "GPUs: networks run on it" rendered "$work/gpu.yaml" 'value: "cuda:0"'
    check "CPUs that go away: time to drain" rendered "$work/spot.yaml" "terminationGracePeriodSeconds: 80"
    check "refused: two autoscalers" refuses "one of them scales" --set keda.enabled=true,autoscaling.enabled=true
    check "refused: nobody to tell that somebody asks" refuses "keda.activationQuery" \
        --set keda.enabled=true,keda.minReplicas=0
    check "refused: a gateway without a parent" refuses "parentRefs" --set gateway.enabled=true
    check "refused: a gateway that cannot check the certificate" refuses "gateway.caConfigMap" \
        --set server.tlsSecret=tls,gateway.enabled=true,gateway.parentRefs[0].name=gateway
    check "refused: a pool without a picker" refuses "endpointPicker" --set inferencePool.enabled=true
    check "refused: a pool over TLS" refuses "inferencePool.enabled" \
        --set inferencePool.enabled=true,inferencePool.endpointPicker.name=picker,server.tlsSecret=tls
    check "refused: a picker that cannot read metrics" refuses "server.metrics" \
        --set inferencePool.enabled=true,inferencePool.endpointPicker.name=picker,server.tokensSecret=tokens
    check "refused: certificates of nobody" refuses "issuer" --set certManager.enabled=true
    check "refused: a device that is none" refuses "devices" --set "engine.devices={gpu0}"
    check "the kustomize base is what the chart renders" base_is_rendered

    check "refused: no worker" refuses "workers" --set engine.workers=0
    check "refused: unknown log format" refuses "format" --set log.format=xml
    check "refused: a misspelt key" refuses "drainGrace" --set server.drainGrace=5
    check "refused: a privileged port" refuses "port" --set server.port=80
    check "refused: text where a number belongs" refuses "drainGraceSeconds" --set-string server.drainGraceSeconds=20s
    check "refused: no CPU request, which the autoscaler needs" refuses "cpu" --set resources.requests.cpu=null
    check "refused: fewer replicas at most than at least" \
        refuses "autoscaling.minReplicas" --set autoscaling.enabled=true,autoscaling.minReplicas=9
else
    skip helm "lint, render, refuse" 69
fi

# The validator itself must be able to say no.
refuses_a_misspelt_field() {
    sed 's/readinessProbe:/readynessProbe:/' "$(grep -l 'kind: Deployment' "$work/defaults"/*.yaml)" \
        >"$work/misspelt-deployment.yaml"
    if kubernetes-validate --strict -k "$1" "$work/misspelt-deployment.yaml" >"$work/refusal" 2>&1; then
        echo "accepted a field that does not exist"
        return 1
    fi
    grep -F readynessProbe "$work/refusal" >/dev/null || { cat "$work/refusal"; return 1; }
}

for version in "${kubernetes_versions[@]}"; do
    if ! have helm; then
        skip helm "validate against Kubernetes $version" 10
    elif ! have kubernetes-validate; then
        skip kubernetes-validate "validate against Kubernetes $version" 10
    else
        for values in defaults all-on tls store gateway certificates cpu gpu spot; do
            check "valid in Kubernetes $version: $values" \
                kubernetes-validate --strict -k "$version" "$work/$values"/*.yaml
        done
        check "refused in Kubernetes $version: a misspelt field" refuses_a_misspelt_field "$version"
    fi
done

if ! have helm || ! have node || [[ ! -d $packages/@kubernetes-models ]]; then
    skip "helm, node or its packages" "validate custom resources" 4
else
    for values in gateway certificates cpu; do
        check "valid custom resources: $values" custom_resources_are_valid "$work/$values-custom"/*.yaml
    done
    check "refused: a route without a parent" refuses_a_route_without_a_parent
fi

echo "chart: $passed passed, $failed failed, $skipped skipped"
((failed == 0))
