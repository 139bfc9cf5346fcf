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
{{- if $values.server.tlsClients -}}
tcpSocket:
  port: {{ $values.server.port }}
{{- else if $values.server.tlsSecret -}}
httpGet:
  scheme: HTTPS
  path: {{ index . 1 }}
  port: {{ $values.server.port }}
{{- else -}}
grpc:
  port: {{ $values.server.port }}
{{- end -}}
{{- end }}
