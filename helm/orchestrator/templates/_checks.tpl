{{/* What no schema can say, and what the operator would refuse only after the objects exist. Each message has its remedy. */}}
{{- define "orchestrator.checks" -}}
{{- include "orchestrator.checkCluster" . -}}
{{- range $name, $fields := .Values.workerGroups -}}
{{- include "orchestrator.checkGroup" (dict "root" $ "name" $name "path" (printf "workerGroups.%s" $name) "group" $fields) -}}
{{- end -}}
{{- range $name, $fields := .Values.jobs -}}
{{- $job := mergeOverwrite (deepCopy $.Values.jobDefaults) (deepCopy (default dict $fields)) -}}
{{- include "orchestrator.checkJob" (dict "root" $ "name" $name "job" $job "fields" (default dict $fields)) -}}
{{- end -}}
{{- include "orchestrator.checkPlacement" (dict "root" . "path" "jobDefaults" "job" .Values.jobDefaults "fields" dict) -}}
{{- end -}}

{{- define "orchestrator.checkCluster" -}}
{{- $values := .Values -}}
{{- $full := include "orchestrator.fullname" . -}}
{{- if not (.Capabilities.APIVersions.Has "ray.io/v1") -}}
{{- fail "KubeRay is not installed in this cluster (no API ray.io/v1). Install it first:\n  helm install kuberay-operator kuberay-operator --repo https://ray-project.github.io/kuberay-helm --version 1.7.0\nTo render without a cluster add: --api-versions ray.io/v1" -}}
{{- end -}}
{{- range $part, $api := dict "podMonitor" "monitoring.coreos.com/v1" "prometheusRule" "monitoring.coreos.com/v1" -}}
{{- if and (eq (toString (get $values.monitoring $part)) "true") (not ($.Capabilities.APIVersions.Has $api)) -}}
{{- fail (printf "monitoring.%s is true, but this cluster has no API %s: install the Prometheus operator, or set it to auto" $part $api) -}}
{{- end -}}
{{- end -}}
{{- if and $values.cluster.enabled (gt (len $full) 53) -}}
{{- fail (printf "the RayCluster would be named %q, %d characters; KubeRay allows 53: use a shorter release name, or set fullnameOverride" $full (len $full)) -}}
{{- end -}}
{{- if not (regexMatch "^[a-z]([-a-z0-9]*[a-z0-9])?$" $full) -}}
{{- fail (printf "the RayCluster would be named %q; it must start with a letter and hold only lower-case letters, digits and '-': set fullnameOverride" $full) -}}
{{- end -}}
{{- if and $values.auth.enabled (semverCompare "<2.52.0" $values.rayVersion) -}}
{{- fail (printf "auth.enabled needs rayVersion 2.52.0 or newer, and it is %s: set auth.enabled=false, or use a newer image" $values.rayVersion) -}}
{{- end -}}
{{- include "orchestrator.checkSecrets" (dict "path" "env" "env" $values.env) -}}
{{- with $values.termination -}}
{{- if or (le (int .gracePeriodSeconds) (int .drainSeconds)) (le (int .gracePeriodSeconds) (int .stopSeconds)) -}}
{{- fail (printf "termination.gracePeriodSeconds=%d must exceed drainSeconds=%d and stopSeconds=%d, or pods are killed before they have saved" (int .gracePeriodSeconds) (int .drainSeconds) (int .stopSeconds)) -}}
{{- end -}}
{{- end -}}
{{- with $values.gcsFaultTolerance -}}
{{- if and .enabled (not .redisAddress) (not .redis.deploy) -}}
{{- fail "gcsFaultTolerance.enabled needs a Redis: set gcsFaultTolerance.redisAddress=HOST:PORT, or gcsFaultTolerance.redis.deploy=true" -}}
{{- end -}}
{{- if and .redisAddress .redis.deploy -}}
{{- fail "gcsFaultTolerance: redisAddress and redis.deploy exclude each other: unset one of them" -}}
{{- end -}}
{{- end -}}
{{- if and $values.kueue.queueName $values.autoscaler.enabled -}}
{{- fail "kueue.queueName and autoscaler.enabled exclude each other: Kueue admits a cluster of one size; set autoscaler.enabled=false" -}}
{{- end -}}
{{- if and $values.kueue.queueName (gt (len $values.workerGroups) 7) -}}
{{- fail (printf "kueue.queueName is set and there are %d worker groups; Kueue admits at most 7 beside the head: drop some, or install two releases" (len $values.workerGroups)) -}}
{{- end -}}
{{- if and $values.kueue.priorityClass (not $values.kueue.queueName) -}}
{{- fail "kueue.priorityClass has no effect without kueue.queueName: set it too" -}}
{{- end -}}
{{- range $path, $uri := dict "storage.uri" $values.storage.uri "fleet.uri" $values.fleet.uri -}}
{{- if and (hasPrefix "/" $uri) (not $values.storage.claimName) -}}
{{- fail (printf "%s=%q is a folder, and the pods' root is not shared: set storage.claimName to a ReadWriteMany claim, or use s3://BUCKET/PREFIX" $path $uri) -}}
{{- end -}}
{{- if and (hasPrefix "/" $uri) (not (hasPrefix (printf "%s/" (trimSuffix "/" $values.storage.mountPath)) (printf "%s/" $uri))) -}}
{{- fail (printf "%s=%q is not below storage.mountPath=%q: what is written there would be lost" $path $uri $values.storage.mountPath) -}}
{{- end -}}
{{- end -}}
{{- if and $values.fleet.enabled (not $values.cluster.enabled) -}}
{{- fail "fleet.enabled needs cluster.enabled=true: without the team's cluster there is nothing to share" -}}
{{- end -}}
{{- if and $values.fleet.enabled (not $values.storage.uri) -}}
{{- fail "fleet.enabled needs storage.uri: runs that share a cluster go on elsewhere from their checkpoints; set storage.uri=s3://BUCKET/PREFIX, or storage.claimName and a folder there" -}}
{{- end -}}
{{- end -}}

{{- define "orchestrator.checkGroup" -}}
{{- if has .name (list "head" "redis" "submitter") -}}
{{- fail (printf "%s: the name %q is taken by another part of the cluster: use another" .path .name) -}}
{{- end -}}
{{- $group := include "orchestrator.group" (dict "root" .root "group" .group) | fromYaml -}}
{{- with $group -}}
{{- $low := int .minReplicas -}}{{- $now := int .replicas -}}{{- $high := int .maxReplicas -}}
{{- if or (gt $low $now) (gt $now $high) -}}
{{- fail (printf "%s: minReplicas=%d <= replicas=%d <= maxReplicas=%d does not hold" $.path $low $now $high) -}}
{{- end -}}
{{- if and .gpu.count .tpu.chips -}}
{{- fail (printf "%s: gpu.count and tpu.chips exclude each other: make two groups" $.path) -}}
{{- end -}}
{{- if and .tpu.chips (or (not .tpu.accelerator) (not .tpu.topology)) -}}
{{- fail (printf "%s: tpu.chips needs tpu.accelerator and tpu.topology, such as tpu-v6e-slice and 4x4" $.path) -}}
{{- end -}}
{{- if and (gt (int .numOfHosts) 1) (not .tpu.chips) -}}
{{- fail (printf "%s: numOfHosts=%d is for TPU slices: set replicas=%d and numOfHosts=1" $.path (int .numOfHosts) (int .numOfHosts)) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "orchestrator.checkJob" -}}
{{- $object := printf "%s-%s" (include "orchestrator.fullname" .root) .name -}}
{{- $path := printf "jobs.%s" .name -}}
{{- if gt (len $object) 47 -}}
{{- fail (printf "%s: the RayJob would be named %q, %d characters; KubeRay allows 47: use a shorter name" $path $object (len $object)) -}}
{{- end -}}
{{- with .job -}}
{{- if not .job -}}
{{- fail (printf "%s.job is missing: say what to run, as in jobs.vision:digits" $path) -}}
{{- end -}}
{{- if and .suspend (not .shutdownAfterJobFinishes) -}}
{{- fail (printf "%s: suspend needs shutdownAfterJobFinishes=true" $path) -}}
{{- end -}}
{{- if and $.root.Values.kueue.queueName (not .shutdownAfterJobFinishes) -}}
{{- fail (printf "%s: kueue.queueName needs shutdownAfterJobFinishes=true, since Kueue suspends what it has not admitted" $path) -}}
{{- end -}}
{{- if hasKey .set "name" -}}
{{- fail (printf "%s.set.name: use %s.runName" $path $path) -}}
{{- end -}}
{{- range $field, $_ := .set -}}
{{- if hasPrefix "fleet." $field -}}
{{- fail (printf "%s.set.%s: use queue, priority and deadlineSeconds of %s; fleet.policy and fleet.uri are the cluster's" $path $field $path) -}}
{{- end -}}
{{- end -}}
{{- include "orchestrator.checkPlacement" (dict "root" $.root "path" $path "job" . "fields" $.fields) -}}
{{- include "orchestrator.checkSecrets" (dict "path" (printf "%s.env" $path) "env" .env) -}}
{{- range $name, $_ := .workerGroups -}}
{{- if not (hasKey $.root.Values.workerGroups $name) -}}
{{- fail (printf "%s.workerGroups.%s: there is no such worker group; valid: %s" $path $name (keys $.root.Values.workerGroups | sortAlpha | join ", ")) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- $groups := include "orchestrator.jobGroups" (dict "root" .root "groups" .job.workerGroups) | fromYaml -}}
{{- range $name, $group := $groups -}}
{{- include "orchestrator.checkGroup" (dict "root" $.root "name" $name "path" (printf "%s.workerGroups.%s" $path $name) "group" $group) -}}
{{- end -}}
{{- end -}}

{{/* What goes together with the cluster a run is on: dict root, path, job (all fields), fields (those of the entry itself). */}}
{{- define "orchestrator.checkPlacement" -}}
{{- if and (eq .job.cluster "team") (not .root.Values.fleet.enabled) -}}
{{- fail (printf "%s.cluster=team needs fleet.enabled=true: runs on one cluster without queues would wait for each other's devices for ever" .path) -}}
{{- end -}}
{{- include "orchestrator.checkDriver" . -}}
{{- if include "orchestrator.shared" . -}}
{{- include "orchestrator.checkShared" . -}}
{{- else -}}
{{- range $name := list "queue" "priority" "deadlineSeconds" -}}
{{- if hasKey $.fields $name -}}
{{- fail (printf "%s.%s has no effect on a cluster of its own: set fleet.enabled=true, and leave cluster empty" $.path $name) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* A driver that wants what no pod offers would wait for ever: dict root, path, job. */}}
{{- define "orchestrator.checkDriver" -}}
{{- $groups := .root.Values.workerGroups -}}
{{- if not (include "orchestrator.shared" .) -}}
{{- $groups = include "orchestrator.jobGroups" (dict "root" .root "groups" .job.workerGroups) | fromYaml -}}
{{- end -}}
{{- $offered := "" -}}
{{- range $fields := $groups -}}
{{- $group := include "orchestrator.group" (dict "root" $.root "group" $fields) | fromYaml -}}
{{- $offered = cat $offered (default "" $group.rayStartParams.resources | replace "\\" "") -}}
{{- end -}}
{{- range $name, $_ := .job.entrypointResources -}}
{{- if not (contains (quote $name) $offered) -}}
{{- fail (printf "%s.entrypointResources.%s: no worker group of the run's cluster offers it; give one rayStartParams: {resources: '\"{\\\"%s\\\": 1}\"'}" $.path $name $name) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* KubeRay's rules for a RayJob that names a cluster instead of describing one, and what it would pass over in silence. */}}
{{- define "orchestrator.checkShared" -}}
{{- $path := .path -}}
{{- with .job -}}
{{- if .suspend -}}
{{- fail (printf "%s.suspend: KubeRay suspends no run on the team's cluster; `orchestrator queue pause RUN` does, or set %s.cluster=own" $path $path) -}}
{{- end -}}
{{- if eq .submissionMode "SidecarMode" -}}
{{- fail (printf "%s.submissionMode=SidecarMode needs a head of its own: leave it empty, or set %s.cluster=own" $path $path) -}}
{{- end -}}
{{- if .activeDeadlineSeconds -}}
{{- fail (printf "%s.activeDeadlineSeconds: on the team's cluster KubeRay would call the run failed and let it go on; bound it with %s.set: {recipe.stop.wall_time_s: SECONDS}, or set %s.cluster=own" $path $path $path) -}}
{{- end -}}
{{- if .workerGroups -}}
{{- fail (printf "%s.workerGroups: the team's cluster has its own; leave them out, or set %s.cluster=own" $path $path) -}}
{{- end -}}
{{- end -}}
{{- if hasKey .fields "backoffLimit" -}}
{{- fail (printf "%s.backoffLimit: KubeRay makes no other cluster for a run on the team's; leave it out: in HTTPMode, the default, a run that a lost head forgot is handed over again" $path) -}}
{{- end -}}
{{- range $name := list "shutdownAfterJobFinishes" "ttlSecondsAfterFinished" -}}
{{- if hasKey $.fields $name -}}
{{- fail (printf "%s.%s: the team's cluster stays when a run has finished; leave it out, or set %s.cluster=own" $path $name $path) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Values are kept in the release and shown by `helm get`: a credential has no place there. */}}
{{- define "orchestrator.checkSecrets" -}}
{{- range $name, $_ := .env -}}
{{- if regexMatch "(?i)(^|_)(secret|password|passwd|token|key|credentials?)(_|$)" $name -}}
{{- fail (printf "%s.%s looks like a credential, and values are no place for one: keep it in a Secret (storage.s3.existingSecret, auth.secretName)" $.path $name) -}}
{{- end -}}
{{- end -}}
{{- end -}}
