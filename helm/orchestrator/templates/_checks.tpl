{{/* What no schema can say, and what the operator would refuse only after the objects exist. Each message has its remedy. */}}
{{- define "orchestrator.checks" -}}
{{- include "orchestrator.checkCluster" . -}}
{{- range $name, $fields := .Values.workerGroups -}}
{{- include "orchestrator.checkGroup" (dict "root" $ "name" $name "path" (printf "workerGroups.%s" $name) "group" $fields) -}}
{{- end -}}
{{- range $name, $fields := .Values.jobs -}}
{{- $job := mergeOverwrite (deepCopy $.Values.jobDefaults) (deepCopy (default dict $fields)) -}}
{{- include "orchestrator.checkJob" (dict "root" $ "name" $name "job" $job) -}}
{{- end -}}
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
{{- if and (hasPrefix "/" $values.storage.uri) (not $values.storage.claimName) -}}
{{- fail (printf "storage.uri=%q is a folder, and the pods' root is not shared: set storage.claimName to a ReadWriteMany claim, or use s3://BUCKET/PREFIX" $values.storage.uri) -}}
{{- end -}}
{{- if and $values.storage.claimName (hasPrefix "/" $values.storage.uri) (not (hasPrefix (printf "%s/" (trimSuffix "/" $values.storage.mountPath)) (printf "%s/" $values.storage.uri))) -}}
{{- fail (printf "storage.uri=%q is not below storage.mountPath=%q: what is written there would be lost" $values.storage.uri $values.storage.mountPath) -}}
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

{{/* Values are kept in the release and shown by `helm get`: a credential has no place there. */}}
{{- define "orchestrator.checkSecrets" -}}
{{- range $name, $_ := .env -}}
{{- if regexMatch "(?i)(^|_)(secret|password|passwd|token|key|credentials?)(_|$)" $name -}}
{{- fail (printf "%s.%s looks like a credential, and values are no place for one: keep it in a Secret (storage.s3.existingSecret, auth.secretName)" $.path $name) -}}
{{- end -}}
{{- end -}}
{{- end -}}
