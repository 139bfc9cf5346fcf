{{- define "denoised.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
{{- end }}

{{- define "denoised.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 63 | trimSuffix "-" }}
{{- else if contains (include "denoised.name" .) .Release.Name }}
{{- .Release.Name | trunc 63 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name (include "denoised.name" .) | trunc 63 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{- define "denoised.selectorLabels" -}}
app.kubernetes.io/name: {{ include "denoised.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "denoised.labels" -}}
{{ include "denoised.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
{{- end }}

{{- define "denoised.podLabels" -}}
{{ include "denoised.labels" . }}
{{- if .Values.inferencePool.enabled }}
# Tells the endpoint picker which metrics to read.
llm-d.ai/engine-type: denoised
{{- end }}
{{- with .Values.podLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* The secret with the server's certificate; empty where it speaks no TLS. */}}
{{- define "denoised.tlsSecret" -}}
{{- if and .Values.certManager.enabled (not .Values.server.tlsSecret) -}}
{{- printf "%s-tls" (include "denoised.fullname" .) }}
{{- else -}}
{{- .Values.server.tlsSecret }}
{{- end -}}
{{- end }}

{{/* What no schema can say: values that do not go together. */}}
{{- define "denoised.checks" -}}
{{- $tls := include "denoised.tlsSecret" . }}
{{- if and .Values.server.tlsClients (not $tls) }}
{{- fail "server.tlsClients needs the server's certificate: server.tlsSecret or certManager.enabled" }}
{{- end }}
{{- if and .Values.inferencePool.enabled $tls }}
{{- fail "inferencePool.enabled is for plaintext: endpoint pickers read metrics without TLS" }}
{{- end }}
{{- if and .Values.inferencePool.enabled .Values.server.tokensSecret (ne .Values.server.metrics "everybody") }}
{{- fail "inferencePool.enabled needs server.metrics=everybody where there are tokens: endpoint pickers have none" }}
{{- end }}
{{- if and .Values.gateway.enabled $tls (not .Values.gateway.caConfigMap) }}
{{- fail "gateway.caConfigMap is empty: the gateway must know what to check the server's certificate with" }}
{{- end }}
{{- end }}

{{/* One repository of models, or none. */}}
{{- define "denoised.repositories" -}}
{{- $named := compact (list .Values.models.existingClaim .Values.models.store .Values.models.image.reference) -}}
{{- if gt (len $named) 1 }}
{{- fail "models.existingClaim, models.store and models.image.reference: a server has one repository" }}
{{- end }}
{{- len $named }}
{{- end }}

{{- define "denoised.serviceAccountName" -}}
{{- if .Values.serviceAccount.create }}
{{- default (include "denoised.fullname" .) .Values.serviceAccount.name }}
{{- else }}
{{- default "default" .Values.serviceAccount.name }}
{{- end }}
{{- end }}

{{/* The one field that kubelet must be given more of than the server needs: it counts the sleep
     before SIGTERM, the drain, and the time in which the cut-off streams are told. */}}
{{- define "denoised.terminationGracePeriodSeconds" -}}
{{- add .Values.server.preStopSeconds .Values.server.drainGraceSeconds 10 }}
{{- end }}

{{/*
How a probe asks, of (list . PATH): over gRPC, which knows no TLS in Kubernetes; over HTTPS where the server speaks TLS;
and only whether the port is open where clients must show certificates, since probes have none.
*/}}
{{- define "denoised.probe" -}}
{{- $values := (index . 0).Values -}}
{{- $tls := include "denoised.tlsSecret" (index . 0) -}}
{{- if $values.server.tlsClients -}}
tcpSocket:
  port: {{ $values.server.port }}
{{- else if $tls -}}
httpGet:
  scheme: HTTPS
  path: {{ index . 1 }}
  port: {{ $values.server.port }}
{{- else -}}
grpc:
  port: {{ $values.server.port }}
{{- end -}}
{{- end }}
