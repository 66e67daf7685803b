{{- define "orchestrator.fullname" -}}
{{- if .Values.fullnameOverride -}}{{ .Values.fullnameOverride }}
{{- else -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- if contains $name .Release.Name -}}{{ .Release.Name }}{{- else -}}{{ .Release.Name }}-{{ $name }}{{- end -}}
{{- end -}}
{{- end -}}

{{- define "orchestrator.selector" -}}
app.kubernetes.io/part-of: orchestrator
orchestrator-release: {{ include "orchestrator.fullname" . }}
{{- end -}}

{{- define "orchestrator.labels" -}}
{{ include "orchestrator.selector" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "orchestrator.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}{{ default (include "orchestrator.fullname" .) .Values.serviceAccount.name }}
{{- else -}}{{ default "default" .Values.serviceAccount.name }}{{- end -}}
{{- end -}}

{{- define "orchestrator.image" -}}
{{- with .Values.image -}}
{{ .repository }}{{ if .digest }}@{{ .digest }}{{ else }}:{{ default $.Chart.AppVersion .tag }}{{ end }}
{{- end -}}
{{- end -}}

{{- define "orchestrator.headService" -}}
{{ include "orchestrator.fullname" . }}-head-svc
{{- end -}}

{{/* A word of a POSIX shell. */}}
{{- define "orchestrator.word" -}}
{{- if regexMatch "^[A-Za-z0-9_./:=,@%+-]+$" . -}}{{ . }}{{- else -}}'{{ replace "'" "'\\''" . }}'{{- end -}}
{{- end -}}

{{/* A value as --arg and --set read it: integers of YAML are floats here, and must not become 1e+06. */}}
{{- define "orchestrator.value" -}}
{{- if kindIs "float64" . -}}
{{- if eq (floor .) . -}}{{ printf "%.0f" . }}{{- else -}}{{ toJson . }}{{- end -}}
{{- else -}}{{ toString . }}{{- end -}}
{{- end -}}

{{/* Whether an optional part is wanted: dict root, value, api. */}}
{{- define "orchestrator.wanted" -}}
{{- $has := .root.Capabilities.APIVersions.Has .api -}}
{{- if eq (toString .value) "auto" -}}{{ if $has }}yes{{ end }}
{{- else if .value -}}yes{{- end -}}
{{- end -}}

{{- define "orchestrator.podSecurity" -}}
runAsNonRoot: true
runAsUser: {{ .Values.security.runAsUser }}
runAsGroup: {{ .Values.security.runAsUser }}
fsGroup: {{ .Values.security.runAsUser }}
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "orchestrator.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: {{ .Values.security.readOnlyRootFilesystem }}
capabilities:
  drop: [ALL]
{{- end -}}

{{/* The environment of every Ray container; what the user names wins. */}}
{{- define "orchestrator.env" -}}
{{- $env := dict
  "HOME" "/home/ray"
  "RAY_USAGE_STATS_ENABLED" "0"
  "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S" (toString .Values.termination.drainSeconds)
  "RAY_JOB_STOP_WAIT_TIME_S" (toString .Values.termination.stopSeconds) -}}
{{- with .Values.gcsFaultTolerance }}{{ if .enabled }}{{ $_ := set $env "RAY_gcs_rpc_server_reconnect_timeout_s" (toString .reconnectTimeoutSeconds) }}{{ end }}{{ end -}}
{{- if ne (toString .Values.monitoring.podMonitor) "false" }}{{ $_ := set $env "ORCHESTRATOR_HUB_BIND" "0.0.0.0" }}{{ end -}}
{{- with .Values.storage.s3.endpointUrl }}{{ $_ := set $env "AWS_ENDPOINT_URL" . }}{{ end -}}
{{- if .Values.fleet.enabled }}{{ $_ := mergeOverwrite $env (include "orchestrator.fleetEnv" . | fromYaml) }}{{ end -}}
{{- with .Values.storage.s3.region }}{{ $_ := mergeOverwrite $env (dict "AWS_REGION" . "AWS_DEFAULT_REGION" .) }}{{ end -}}
{{- range $name, $value := mergeOverwrite $env (deepCopy .Values.env) }}
- {name: {{ $name }}, value: {{ $value | quote }}}
{{- end }}
{{- with .Values.storage.s3.existingSecret }}
{{- range $key := list "AWS_ACCESS_KEY_ID" "AWS_SECRET_ACCESS_KEY" "AWS_SESSION_TOKEN" }}
- name: {{ $key }}
  valueFrom:
    secretKeyRef:
      name: {{ $.Values.storage.s3.existingSecret }}
      key: {{ $key }}
      optional: {{ eq $key "AWS_SESSION_TOKEN" }}
{{- end }}
{{- end }}
{{- end -}}

{{/* What the fleet's service reads on the head, as YAML: it stands over what the first run says. */}}
{{- define "orchestrator.fleetEnv" -}}
{{- $quotas := list -}}
{{- range $queue, $devices := .Values.fleet.quotas }}{{ $quotas = append $quotas (printf "%s=%d" $queue (int $devices)) }}{{ end -}}
ORCHESTRATOR_FLEET_POLICY: {{ .Values.fleet.policy }}
ORCHESTRATOR_FLEET_URI: {{ default (printf "%s/.fleet" (trimSuffix "/" .Values.storage.uri)) .Values.fleet.uri | quote }}
{{- with $quotas }}
ORCHESTRATOR_FLEET_QUOTAS: {{ join "," . | quote }}
{{- end }}
{{- end -}}

{{/* A group's fields over the defaults: dict root, group. The result is YAML. */}}
{{- define "orchestrator.group" -}}
{{- toYaml (mergeOverwrite (deepCopy .root.Values.workerDefaults) (deepCopy (default dict .group))) -}}
{{- end -}}

{{/* How many worker pods the team's cluster has at all times: with an autoscaler no more than its groups' fewest are sure. */}}
{{- define "orchestrator.steadyWorkers" -}}
{{- $pods := 0 -}}
{{- range $fields := .Values.workerGroups -}}
{{- $group := include "orchestrator.group" (dict "root" $ "group" $fields) | fromYaml -}}
{{- $replicas := ternary $group.minReplicas $group.replicas $.Values.autoscaler.enabled -}}
{{- $pods = add $pods (mul (int $replicas) (int $group.numOfHosts)) -}}
{{- end -}}
{{- $pods -}}
{{- end -}}

{{/* Node labels that a group's hardware means: the group. */}}
{{- define "orchestrator.hardwareSelector" -}}
{{- $labels := dict -}}
{{- with .gpu }}{{ if and .count .product }}{{ $_ := set $labels .productLabel .product }}{{ end }}{{ end -}}
{{- with .tpu }}{{ if .chips -}}
{{- $_ := set $labels "cloud.google.com/gke-tpu-accelerator" .accelerator -}}
{{- $_ := set $labels "cloud.google.com/gke-tpu-topology" .topology -}}
{{- end }}{{ end -}}
{{- $spot := dict
  "aws" (dict "eks.amazonaws.com/capacityType" "SPOT")
  "karpenter" (dict "karpenter.sh/capacity-type" "spot")
  "gke" (dict "cloud.google.com/gke-spot" "true")
  "aks" (dict "kubernetes.azure.com/scalesetpriority" "spot") -}}
{{- with .spot }}{{ $_ := mergeOverwrite $labels (get $spot .) }}{{ end -}}
{{- toYaml (mergeOverwrite $labels (default dict .nodeSelector)) -}}
{{- end -}}

{{/* Taints that a group's hardware means it must tolerate: the group. */}}
{{- define "orchestrator.hardwareTolerations" -}}
{{- $all := list -}}
{{- with .gpu }}{{ if .count }}{{ $all = append $all (dict "key" .resource "operator" "Exists" "effect" "NoSchedule") }}{{ end }}{{ end -}}
{{- with .tpu }}{{ if .chips }}{{ $all = append $all (dict "key" "google.com/tpu" "operator" "Exists" "effect" "NoSchedule") }}{{ end }}{{ end -}}
{{- $spot := dict
  "aws" (dict "key" "spot" "operator" "Exists" "effect" "NoSchedule")
  "karpenter" (dict "key" "karpenter.sh/capacity-type" "operator" "Equal" "value" "spot" "effect" "NoSchedule")
  "gke" (dict "key" "cloud.google.com/gke-spot" "operator" "Equal" "value" "true" "effect" "NoSchedule")
  "aks" (dict "key" "kubernetes.azure.com/scalesetpriority" "operator" "Equal" "value" "spot" "effect" "NoSchedule") -}}
{{- with .spot }}{{ $all = append $all (get $spot .) }}{{ end -}}
{{- toYaml (concat $all (default list .tolerations)) -}}
{{- end -}}

{{/* A pod of the cluster: dict root, group, name, head (bool). Head and workers differ in ports and placement only. */}}
{{- define "orchestrator.podTemplate" -}}
{{- $root := .root -}}
{{- $group := .group -}}
metadata:
  labels:
    {{- include "orchestrator.labels" $root | nindent 4 }}
    orchestrator-group: {{ .name }}
  annotations:
    cluster-autoscaler.kubernetes.io/safe-to-evict: {{ ternary "false" "true" .head | quote }}
spec:
  serviceAccountName: {{ include "orchestrator.serviceAccountName" $root }}
  automountServiceAccountToken: {{ or (and .head $root.Values.autoscaler.enabled) (not (empty $root.Values.serviceAccount.annotations)) }}
  enableServiceLinks: false
  terminationGracePeriodSeconds: {{ $root.Values.termination.gracePeriodSeconds }}
  {{- if $root.Values.autoscaler.enabled }}
  restartPolicy: Never
  {{- end }}
  {{- with $root.Values.imagePullSecrets }}
  imagePullSecrets:
    {{- range . }}
    - name: {{ . }}
    {{- end }}
  {{- end }}
  {{- with $group.priorityClassName }}
  priorityClassName: {{ . }}
  {{- end }}
  securityContext:
    {{- include "orchestrator.podSecurity" $root | nindent 4 }}
  {{- with include "orchestrator.hardwareSelector" $group | fromYaml }}
  nodeSelector:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with include "orchestrator.hardwareTolerations" $group | fromYamlArray }}
  tolerations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $group.affinity }}
  affinity:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $group.topologySpread }}
  {{- if .enabled }}
  topologySpreadConstraints:
    - maxSkew: 1
      topologyKey: {{ .key }}
      whenUnsatisfiable: {{ .whenUnsatisfiable }}
      labelSelector:
        matchLabels:
          {{- include "orchestrator.selector" $root | nindent 10 }}
          orchestrator-group: {{ $.name }}
  {{- end }}
  {{- end }}
  containers:
    - name: {{ ternary "ray-head" "ray-worker" .head }}
      image: {{ include "orchestrator.image" $root }}
      imagePullPolicy: {{ $root.Values.image.pullPolicy }}
      env:
        {{- include "orchestrator.env" $root | nindent 8 }}
      ports:
        {{- if .head }}
        - {name: gcs-server, containerPort: 6379, protocol: TCP}
        - {name: dashboard, containerPort: 8265, protocol: TCP}
        - {name: client, containerPort: 10001, protocol: TCP}
        - {name: run-metrics, containerPort: 9400, protocol: TCP}
        {{- end }}
        - {name: metrics, containerPort: 8080, protocol: TCP}
      resources:
        {{- include "orchestrator.resources" $group | nindent 8 }}
      securityContext:
        {{- include "orchestrator.containerSecurity" $root | nindent 8 }}
      volumeMounts:
        - {name: shm, mountPath: /dev/shm}
        - {name: tmp, mountPath: /tmp}
        - {name: home, mountPath: /home/ray}
        {{- if $root.Values.storage.claimName }}
        - {name: runs, mountPath: {{ $root.Values.storage.mountPath }}}
        {{- end }}
  volumes:
    - {name: shm, emptyDir: {medium: Memory, sizeLimit: {{ $group.shmSize }}}}
    - {name: tmp, emptyDir: {sizeLimit: {{ $group.tmpSize }}}}
    - {name: home, emptyDir: {}}
    {{- with $root.Values.storage.claimName }}
    - {name: runs, persistentVolumeClaim: {claimName: {{ . }}}}
    {{- end }}
{{- end -}}

{{/* Requests equal limits: a pod that trains has what it asks for, and no more. */}}
{{- define "orchestrator.resources" -}}
{{- $all := dict "cpu" .cpus "memory" .memory -}}
{{- with .gpu }}{{ if .count }}{{ $_ := set $all .resource (toString .count) }}{{ end }}{{ end -}}
{{- with .tpu }}{{ if .chips }}{{ $_ := set $all "google.com/tpu" (toString .chips) }}{{ end }}{{ end -}}
{{- toYaml (dict "requests" $all "limits" $all) -}}
{{- end -}}

{{/* The spec of a RayCluster: dict root, groups (name -> fields), standing (bool). */}}
{{- define "orchestrator.clusterSpec" -}}
{{- $root := .root -}}
{{- $values := .root.Values -}}
rayVersion: {{ $values.rayVersion | quote }}
{{- if .standing }}
upgradeStrategy:
  type: {{ $values.cluster.upgradeStrategy }}
{{- end }}
{{- if $values.auth.enabled }}
authOptions:
  mode: token
  {{- with $values.auth.secretName }}
  secretName: {{ . }}
  {{- end }}
{{- end }}
{{- if $values.autoscaler.enabled }}
enableInTreeAutoscaling: true
autoscalerOptions:
  version: v2
  idleTimeoutSeconds: {{ $values.autoscaler.idleTimeoutSeconds }}
  upscalingMode: {{ $values.autoscaler.upscalingMode }}
  imagePullPolicy: {{ $values.image.pullPolicy }}
  securityContext:
    {{- include "orchestrator.containerSecurity" $root | nindent 4 }}
  volumeMounts:
    - {name: tmp, mountPath: /tmp}
    - {name: home, mountPath: /home/ray}
  resources:
    requests: {cpu: 500m, memory: 512Mi}
    limits: {cpu: 500m, memory: 512Mi}
{{- end }}
{{- with $values.gcsFaultTolerance }}
{{- if .enabled }}
gcsFaultToleranceOptions:
  backend: redis
  redisAddress: {{ default (printf "%s-redis:6379" (include "orchestrator.fullname" $root)) .redisAddress | quote }}
  {{- if .passwordSecret.name }}
  redisPassword:
    valueFrom:
      secretKeyRef:
        name: {{ .passwordSecret.name }}
        key: {{ .passwordSecret.key }}
  {{- end }}
{{- end }}
{{- end }}
headGroupSpec:
  serviceType: {{ $values.head.serviceType }}
  rayStartParams:
    {{- $params := dict "num-cpus" "0" "dashboard-host" "0.0.0.0" "metrics-export-port" "8080" }}
    {{- toYaml (mergeOverwrite $params (deepCopy $values.head.rayStartParams)) | nindent 4 }}
  template:
    {{- include "orchestrator.podTemplate" (dict "root" $root "group" $values.head "name" "head" "head" true) | nindent 4 }}
{{- if .groups }}
workerGroupSpecs:
  {{- range $name, $fields := .groups }}
  {{- $group := include "orchestrator.group" (dict "root" $root "group" $fields) | fromYaml }}
  - groupName: {{ $name }}
    replicas: {{ $group.replicas }}
    minReplicas: {{ $group.minReplicas }}
    maxReplicas: {{ $group.maxReplicas }}
    numOfHosts: {{ $group.numOfHosts }}
    {{- if and $group.idleTimeoutSeconds $values.autoscaler.enabled }}
    idleTimeoutSeconds: {{ $group.idleTimeoutSeconds }}
    {{- end }}
    rayStartParams:
      {{- toYaml (mergeOverwrite (dict "metrics-export-port" "8080") (deepCopy $group.rayStartParams)) | nindent 6 }}
    template:
      {{- include "orchestrator.podTemplate" (dict "root" $root "group" $group "name" $name "head" false) | nindent 6 }}
  {{- end }}
{{- end }}
{{- end -}}

{{/* Worker groups of a run's own cluster, as YAML: dict root, groups (what is different; empty: all). */}}
{{- define "orchestrator.jobGroups" -}}
{{- $all := dict -}}
{{- range $name, $fields := .root.Values.workerGroups -}}
{{- if or (empty $.groups) (hasKey $.groups $name) -}}
{{- $_ := set $all $name (mergeOverwrite (deepCopy (default dict $fields)) (deepCopy (default dict (get $.groups $name)))) -}}
{{- end -}}
{{- end -}}
{{- toYaml $all -}}
{{- end -}}

{{/* Whether a run is on the team's cluster, which others use too: dict root, job. */}}
{{- define "orchestrator.shared" -}}
{{- if or (eq .job.cluster "team") (and (not .job.cluster) .root.Values.fleet.enabled) -}}yes{{- end -}}
{{- end -}}

{{/* How the operator hands a run over: dict root, job. With HTTPMode it does so again after a lost head. */}}
{{- define "orchestrator.submissionMode" -}}
{{- default (ternary "HTTPMode" "K8sJobMode" (eq (include "orchestrator.shared" .) "yes")) .job.submissionMode -}}
{{- end -}}

{{/* The command of a run: dict root, name, job. Without a shell between, a stop on a cluster that stays is heard at once. */}}
{{- define "orchestrator.entrypoint" -}}
{{- $shared := include "orchestrator.shared" . -}}
{{- $words := concat (ternary (list "exec") list (eq $shared "yes")) (list "python" "-m" "orchestrator" "run" .job.job) -}}
{{- range $name, $value := .job.args -}}
{{- $words = concat $words (list "--arg" (printf "%s=%s" $name (include "orchestrator.value" $value))) -}}
{{- end -}}
{{- $set := dict "name" (default .name .job.runName) -}}
{{- with .root.Values.storage.uri }}{{ $_ := set $set "checkpoint.uri" . }}{{ end -}}
{{- if $shared -}}
{{- $_ := set $set "fleet.queue" .job.queue -}}
{{- with int .job.priority }}{{ $_ := set $set "fleet.priority" . }}{{ end -}}
{{- with int .job.deadlineSeconds }}{{ $_ := set $set "fleet.deadline_s" . }}{{ end -}}
{{- end -}}
{{- range $field, $value := mergeOverwrite $set (deepCopy .job.set) -}}
{{- $words = concat $words (list "--set" (printf "%s=%s" $field (include "orchestrator.value" $value))) -}}
{{- end -}}
{{- range $i, $word := $words }}{{ if $i }} {{ end }}{{ include "orchestrator.word" $word }}{{ end -}}
{{- end -}}

{{- define "orchestrator.runtimeEnv" -}}
{{- $env := dict -}}
{{- with .workingDir }}{{ $_ := set $env "working_dir" . }}{{ end -}}
{{- with .pip }}{{ $_ := set $env "pip" . }}{{ end -}}
{{- with .env }}{{ $_ := set $env "env_vars" . }}{{ end -}}
{{- if $env }}{{ toYaml $env }}{{ end -}}
{{- end -}}

{{/* A RayJob: dict root, name (of the entry), object (its name), job (all fields). */}}
{{- define "orchestrator.rayJob" -}}
{{- $root := .root -}}
{{- $job := .job -}}
{{- $shared := include "orchestrator.shared" . -}}
{{- $mode := include "orchestrator.submissionMode" . -}}
apiVersion: ray.io/v1
kind: RayJob
metadata:
  name: {{ .object }}
  namespace: {{ $root.Release.Namespace }}
  labels:
    {{- include "orchestrator.labels" $root | nindent 4 }}
    {{- if not $shared }}
    {{- include "orchestrator.kueue" $root | nindent 4 }}
    {{- end }}
spec:
  entrypoint: {{ include "orchestrator.entrypoint" (dict "root" $root "name" .name "job" $job) | quote }}
  {{- with include "orchestrator.runtimeEnv" $job }}
  runtimeEnvYAML: |
    {{- . | nindent 4 }}
  {{- end }}
  entrypointNumCpus: {{ $job.entrypointCpus }}
  {{- with $job.entrypointResources }}
  entrypointResources: {{ toJson . | quote }}
  {{- end }}
  submissionMode: {{ $mode }}
  {{- if eq $mode "K8sJobMode" }}
  submitterPodTemplate:
    {{- include "orchestrator.submitter" $root | nindent 4 }}
  {{- end }}
  {{- if $shared }}
  clusterSelector:
    ray.io/cluster: {{ include "orchestrator.fullname" $root }}
  metadata:
    orchestrator_run: {{ default .name $job.runName }}
  {{- else }}
  backoffLimit: {{ $job.backoffLimit }}
  {{- with $job.activeDeadlineSeconds }}
  activeDeadlineSeconds: {{ . }}
  {{- end }}
  shutdownAfterJobFinishes: {{ $job.shutdownAfterJobFinishes }}
  {{- if $job.shutdownAfterJobFinishes }}
  ttlSecondsAfterFinished: {{ $job.ttlSecondsAfterFinished }}
  {{- end }}
  {{- if $job.suspend }}
  suspend: true
  {{- end }}
  rayClusterSpec:
    {{- $groups := include "orchestrator.jobGroups" (dict "root" $root "groups" $job.workerGroups) | fromYaml }}
    {{- include "orchestrator.clusterSpec" (dict "root" $root "groups" $groups "standing" false) | nindent 4 }}
  {{- end }}
{{- end -}}

{{/* The pod that hands the run over; the operator fills in its command. */}}
{{- define "orchestrator.submitter" -}}
metadata:
  labels:
    {{- include "orchestrator.labels" . | nindent 4 }}
    orchestrator-group: submitter
spec:
  serviceAccountName: {{ include "orchestrator.serviceAccountName" . }}
  automountServiceAccountToken: false
  enableServiceLinks: false
  restartPolicy: Never
  {{- with .Values.imagePullSecrets }}
  imagePullSecrets:
    {{- range . }}
    - name: {{ . }}
    {{- end }}
  {{- end }}
  securityContext:
    {{- include "orchestrator.podSecurity" . | nindent 4 }}
  containers:
    - name: ray-job-submitter
      image: {{ include "orchestrator.image" . }}
      imagePullPolicy: {{ .Values.image.pullPolicy }}
      env:
        - {name: HOME, value: /home/ray}
      resources:
        requests: {cpu: 200m, memory: 512Mi}
        limits: {cpu: "1", memory: 1Gi}
      securityContext:
        {{- include "orchestrator.containerSecurity" . | nindent 8 }}
      volumeMounts:
        - {name: tmp, mountPath: /tmp}
        - {name: home, mountPath: /home/ray}
  volumes:
    - {name: tmp, emptyDir: {sizeLimit: 2Gi}}
    - {name: home, emptyDir: {}}
{{- end -}}

{{- define "orchestrator.kueue" -}}
{{- with .Values.kueue -}}
{{- with .queueName }}
kueue.x-k8s.io/queue-name: {{ . }}
{{- end }}
{{- with .priorityClass }}
kueue.x-k8s.io/priority-class: {{ . }}
{{- end }}
{{- end -}}
{{- end -}}
